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


Ckpt = Annotated[Path, folder("The checkpoint's folder.")]
Threads = Annotated[int, count("OpenMP threads of a server, or of what is timed.")]
Seed = Annotated[int, option("Seed of what is random.")]
NewTokens = Annotated[int, count("Tokens of an answer.")]
PromptLen = Annotated[int, count("Tokens of a prompt.")]
CacheBytes = Annotated[int, count("KV cache of each server, in bytes.")]
StartTimeout = Annotated[int, count("Longest start of the servers, in s.")]
EnforceEager = Annotated[
    bool,
    option("Do not compile the models. Compiling takes minutes of CPU per server at each start.",
           "--enforce-eager"),
]  # fmt: skip
Csv = Annotated[Path, folder("Rows are added to this file.")]
NoSave = Annotated[bool, option("Write no results.", "--no-save")]
LogFolder = Annotated[Path, folder("Folder of the servers' logs.")]
