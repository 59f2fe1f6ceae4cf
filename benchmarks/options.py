"""Options that several benchmarks have, as annotations that typer reads."""

from __future__ import annotations

from dataclasses import dataclass
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
    """Return a number of bytes from `1500000` or `256M`; K, M and G are powers of 1024."""
    text = str(given)  # a default is a number
    number, unit = text.rstrip("KMG"), text[len(text.rstrip("KMG")) :]
    if not (number.isascii() and number.isdigit() and int(number) > 0 and len(unit) < 2):
        raise typer.BadParameter(f"{text!r} is not a number of bytes above 0, like 256M")
    return int(number) * 1024 ** " KMG".index(unit or " ")


# typer takes lists of enums, and none of literals.
Dtype = StrEnum("Dtype", ["FLOAT32", "BFLOAT16", "FLOAT16"])
ShortDtype = StrEnum("ShortDtype", ["FP32", "BF16", "FP16"])
Phase = StrEnum("Phase", ["DECODE", "PREFILL", "WRITE"])

Threads = Annotated[int, count("OpenMP threads of a server, or of what is timed.")]
PromptLen = Annotated[int, count("Tokens of a prompt.")]
NewTokens = Annotated[int, count("Tokens of an answer.")]
Seed = Annotated[int, option("Seed of what is random.")]
CacheBytes = Annotated[
    int, option("KV cache of each server, in bytes or as 256M.", parser=size, metavar="BYTES")
]
Csv = Annotated[Path, folder("Rows are added to this file.")]
NoSave = Annotated[bool, option("Write no results.", "--no-save")]
LogFolder = Annotated[Path, folder("Folder of the servers' logs.")]


@dataclass(frozen=True)
class RequestOptions:
    """The random requests that are sent."""

    prompt_len: PromptLen = 128
    new_tokens: NewTokens = 32
    seed: Seed = 0

    @property
    def length(self) -> int:
        """Tokens of prompt and answer."""
        return self.prompt_len + self.new_tokens


@dataclass(frozen=True)
class ServerOptions:
    """What all servers of a run have in common."""

    threads: Threads = CORES
    kv_cache_memory_bytes: CacheBytes = 256 << 20
    enforce_eager: Annotated[
        bool,
        option("Do not compile the models. Compiling takes minutes of CPU per server at each "
               "start.", "--enforce-eager"),
    ] = False  # fmt: skip
    start_timeout: Annotated[int, count("Longest start of the servers, in s.")] = 1800
    log_folder: LogFolder = Path(".run")

    def described(self, **more: Any) -> dict[str, Any]:
        """Return what the run is made on and with: the columns that all its rows share."""
        return {
            **machine.described(),
            "threads": self.threads,
            "mode": "eager" if self.enforce_eager else "compiled",
            "kv_cache_memory_bytes": self.kv_cache_memory_bytes,
            **more,
        }
