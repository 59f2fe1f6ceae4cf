"""What a part of the run is made of, and how a worker process goes through it.

Each part runs in processes of its own: an illegal memory access spoils a process's device for good,
a compiler may crash, and a kernel may hang. The parent (`__main__.py`) reads what a worker has
written, line by line, and goes on.
"""

from __future__ import annotations

import dataclasses
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnserve import machine

Row = dict[str, Any]
"""At least `part`, `check`, `status` ("ok", "failed" or "skipped") and `detail`."""

SPOILED = 3
"""Exit code of a worker whose device does not answer any more."""


class SkippedError(Exception):
    """Why a check cannot be made here, in one line."""


@dataclass(frozen=True)
class Task:
    """What a worker is told.

    Attributes:
        part: a key of `worker.PARTS`.
        device: "cuda", or "cpu" for Triton's interpreter.
        variants, dtypes, head_dims: to be checked.
        longest: tokens of the longest request, in the parts that check.
        worker, workers: this one does every `workers`-th check.
        done: checks that are not to be made again.
        deadline: seconds since the epoch; no check begins after it.
        rows: file for what was found, a JSON object a line.
        seed: of the random inputs.
    """

    part: str
    device: str
    variants: tuple[str, ...]
    dtypes: tuple[str, ...]
    head_dims: tuple[int, ...]
    longest: int
    worker: int
    workers: int
    done: tuple[str, ...]
    deadline: float
    rows: Path
    seed: int = 0

    def dumps(self) -> str:
        """As a command-line argument."""
        return json.dumps({**dataclasses.asdict(self), "rows": str(self.rows)})

    @classmethod
    def loads(cls, text: str) -> Task:
        """From a command-line argument."""
        fields: dict[str, Any] = json.loads(text)
        fields |= {name: tuple(x) for name, x in fields.items() if isinstance(x, list)}
        return cls(**{**fields, "rows": Path(fields["rows"])})


@dataclass(frozen=True)
class Check:
    """One check: its name within the part, and what gives its rows."""

    name: str
    run: Callable[[], Iterable[Row]]


def require_vllm(device: str) -> None:
    """Make sure of vLLM's CUDA build.

    Raises:
        SkippedError: it is not installed.
    """
    found = machine.package("vllm")
    if device != "cuda" or not found or found.endswith("+cpu"):
        has = f"found {found}" if found else "found none"
        raise SkippedError(f"vLLM for CUDA is not installed ({has})")


def first_line(error: BaseException) -> str:
    """An error in one line."""
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def work(task: Task, checks: Iterable[Check]) -> int:
    """Make the checks of this worker and write their rows as they come; its exit code."""
    mine = list(checks)[task.worker :: task.workers]
    left = [check for check in mine if check.name not in task.done]
    with task.rows.open("a") as file:

        def write(line: Row) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()

        write({"left": [check.name for check in left]})
        for check in left:
            if time.time() > task.deadline:
                return 0
            write({"begun": check.name})
            common = {"part": task.part, "check": check.name, "status": "ok", "detail": ""}
            try:
                found = [{**common, **row} for row in check.run()]
            except SkippedError as why:
                found = [{**common, "status": "skipped", "detail": str(why)}]
            except Exception as error:
                found = [{**common, "status": "failed", "detail": first_line(error)}]
            for row in found:
                write(row)
            write({"ended": check.name})
            if any("CUDA error" in row["detail"] for row in found):
                return SPOILED
    return 0
