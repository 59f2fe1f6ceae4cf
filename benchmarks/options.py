"""Options that several benchmarks have, as annotations that typer reads."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from attnserve import machine
from attnserve.command import expanded

CORES = machine.cores()


def option(text: str, *names: str, **settings: Any) -> Any:
    """Return an option with this help."""
    return typer.Option(*names, help=text, **settings)


def count(text: str) -> Any:
    """Return an option that is a whole number above 0."""
    return typer.Option(help=text, min=1)


def folder(text: str) -> Any:
    """Return an option that is a path, whose `~` is a home folder's."""
    return typer.Option(help=text, parser=expanded, metavar="PATH")


def size(given: str | int) -> int:
    """Return a number of bytes from `1500000` or `256M`; K, M and G are powers of 1024.

    Raises:
        typer.BadParameter: it is none.
    """
    text = str(given)  # a default is a number
    number, unit = text.rstrip("KMG"), text[len(text.rstrip("KMG")) :]
    if not (number.isascii() and number.isdigit() and int(number) > 0 and len(unit) < 2):
        raise typer.BadParameter(f"{text!r} is not a number of bytes above 0, like 256M")
    return int(number) * 1024 ** " KMG".index(unit or " ")


class Dtype(StrEnum):
    """Type of a model's weights, activations and cache."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class ShortDtype(StrEnum):
    """The same, as the benchmarks of kernels call them."""

    FP32 = "fp32"
    BF16 = "bf16"
    FP16 = "fp16"


class Phase(StrEnum):
    """What a call of attention is for."""

    DECODE = "decode"
    PREFILL = "prefill"


ModelDtype = Annotated[
    Dtype, option("Type of activations, caches, and weights that are not packed.")
]
Threads = Annotated[int, count("OpenMP threads of a server, or of what is timed.")]
Seed = Annotated[int, option("Seed of what is random.")]
NewTokens = Annotated[int, count("Tokens of an answer.")]
PromptLen = Annotated[int, count("Tokens of a prompt.")]
CacheBytes = Annotated[
    int, option("KV cache of each server, in bytes or as 256M.", parser=size, metavar="BYTES")
]
StartTimeout = Annotated[int, count("Longest start of the servers, in s.")]
EnforceEager = Annotated[
    bool,
    option("Do not compile the models. Compiling takes minutes of CPU per server at each start.",
           "--enforce-eager"),
]  # fmt: skip
Csv = Annotated[Path, folder("Rows are added to this file.")]
NoSave = Annotated[bool, option("Write no results.", "--no-save")]
LogFolder = Annotated[Path, folder("Folder of the servers' logs.")]
Ckpts = Annotated[
    list[Path] | None,
    folder("Folders of checkpoints as they were trained (default: softmax, softpick and selective "
           "of checkpoints/)."),
]  # fmt: skip
Packed = Annotated[list[Path] | None, folder("Folders that quant.quantize has written.")]
Budgets = Annotated[
    list[int] | None,
    option("Tokens that each layer of a selective checkpoint keeps (default: 8 8 12 16; 0: those "
           "of config.json).", min=0),
]  # fmt: skip
