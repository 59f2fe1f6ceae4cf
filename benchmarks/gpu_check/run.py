"""The parts one after another within the time there is, each in worker processes."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tqdm import tqdm

from attnserve.files import CHECKOUT
from benchmarks.gpu_check.checks import Row, Task

SHARES = {"matrix": 45.0, "graph": 10.0, "packed": 10.0, "timing": 25.0, "serve": 20.0}
"""Of the time, by part, in order; what a part leaves goes to those after it."""

GRACE_SECONDS = 15.0
"""How long a check may go on after the part's deadline before it is ended."""

STOP_SECONDS = 25.0
"""How long a worker may take to stop: one of them has a server to end."""

HANG_SECONDS = 90.0
"""A check that is ended after so long is red: no check should take that."""

Command = Callable[[Task], list[str]]


def worker_command(task: Task) -> list[str]:
    """The command line of a worker."""
    return [sys.executable, "-m", "benchmarks.gpu_check.worker", task.dumps()]


@dataclass
class Budget:
    """Shares out the time.

    Args:
        seconds: of the whole run.
        parts: those of SHARES that are run.
        clock: seconds since the epoch.
    """

    seconds: float
    parts: Sequence[str]
    clock: Callable[[], float] = time.time
    end: float = field(init=False)

    def __post_init__(self) -> None:
        self.end = self.clock() + self.seconds

    def deadline(self, part: str) -> float:
        """When a part that begins now must begin no more checks."""
        parts = list(self.parts)
        coming = parts[parts.index(part) :]
        share = SHARES[part] / sum(SHARES[each] for each in coming)
        now = self.clock()
        return now + max(0.0, self.end - now) * share


class Worker:
    """One worker's process, started again where it stopped if it ends early."""

    def __init__(self, task: Task, command: Command, environment: Mapping[str, str]) -> None:
        self.task, self.command, self.environment = task, command, environment
        self.error_file = task.rows.with_suffix(".err")
        self.found: list[Row] = []
        self.left: list[str] = []
        self.done: list[str] = []
        self.begun: str | None = None
        self.begun_at = 0.0
        self._read = 0
        self.start()

    def start(self) -> None:
        """Start its process in a group of its own."""
        task = dataclasses.replace(self.task, done=tuple(self.done))
        with self.error_file.open("wb") as errors:
            self.process = subprocess.Popen(
                self.command(task),
                cwd=CHECKOUT,
                env={**os.environ, **self.environment},
                stdin=subprocess.DEVNULL,
                stdout=errors,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def kill(self) -> None:
        """End its process with all its children: ask first."""
        if self.process.poll() is None:
            self.process.terminate()
            with contextlib.suppress(subprocess.TimeoutExpired):
                self.process.wait(STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def read(self) -> None:
        """Take in what it has written since."""
        if not self.task.rows.exists():
            return
        with self.task.rows.open("rb") as file:
            file.seek(self._read)
            text = file.read()
        whole = text[: text.rfind(b"\n") + 1]
        self._read += len(whole)
        for line in map(json.loads, whole.splitlines()):
            if "left" in line:
                self.left = line["left"]
            elif "begun" in line:
                self.begun, self.begun_at = line["begun"], time.time()
            elif "ended" in line:
                self.done.append(line["ended"])
                self.begun = None
            else:
                self.found.append(line)

    def fail(self, why: str, status: str = "failed") -> None:
        """A row for the check that was begun, or for the worker."""
        name = self.begun or f"worker {self.task.worker}"
        row = {"part": self.task.part, "check": name, "status": status, "detail": why}
        self.found.append(row)
        self.done.append(name)
        self.begun = None

    def last_words(self) -> str:
        """The last line of what its process printed."""
        lines = self.error_file.read_text(errors="replace").split("\n")
        return next((line.strip() for line in reversed(lines) if line.strip()), "no message")

    def missed(self) -> list[str]:
        """Checks that it has not made."""
        return [name for name in self.left if name not in self.done]

    def ended(self) -> bool:
        """Look after its process; True once there is nothing more to wait for."""
        code = self.process.poll()
        self.read()
        if code is None:
            if time.time() <= self.task.deadline + GRACE_SECONDS:
                return False
            self.kill()
            self.read()
            took = time.time() - self.begun_at if self.begun else HANG_SECONDS
            status = "failed" if took >= HANG_SECONDS else "skipped"
            self.fail(f"out of time: ended after {took:.0f} s: {self.last_words()}", status)
            return True
        if code == 0:
            return True
        knew = bool(self.left)
        if self.begun or not self.done:
            self.fail(f"exit code {code}: {self.last_words()}")
        if not (knew and self.missed()) or time.time() > self.task.deadline:
            return True
        self.start()
        return False


def run_part(
    tasks: Sequence[Task],
    command: Command = worker_command,
    environment: Mapping[str, str] | None = None,
) -> list[Row]:
    """Rows of one part.

    Args:
        tasks: of its workers.
        command: gives a worker's command line.
        environment: added to this process's.
    """
    part = tasks[0].part
    workers: list[Worker] = []
    try:
        workers += [Worker(task, command, environment or {}) for task in tasks]
        running = list(workers)
        with tqdm(desc=part, unit="check", mininterval=1, disable=None) as bar:
            while running:
                running = [worker for worker in running if not worker.ended()]
                bar.total = sum(len(worker.left) for worker in workers) or None
                bar.update(sum(len(worker.done) for worker in workers) - bar.n)
                time.sleep(0.05)
    finally:
        for worker in workers:
            worker.kill()
    rows = [row for worker in workers for row in worker.found]
    missed = [name for worker in workers for name in worker.missed()]
    if missed:
        detail = (
            f"out of time: {len(missed)} of {sum(len(w.left) for w in workers)} checks not made"
        )
        rows.append({"part": part, "check": "the rest", "status": "skipped", "detail": detail})
    return rows


def run(
    parts: Sequence[str],
    seconds: float,
    template: Task,
    workers: int,
    folder: Path,
    environment: Mapping[str, str],
    command: Command = worker_command,
) -> list[Row]:
    """Rows of all parts.

    Args:
        parts: keys of SHARES.
        seconds: of the whole run.
        template: the tasks but for part, worker and deadline.
        workers: of the matrix; the other parts have one.
        folder: for what workers write.
        environment: of the workers.
        command: gives a worker's command line.
    """
    budget = Budget(seconds, parts)
    rows: list[Row] = []
    for part in parts:
        deadline = budget.deadline(part)
        if budget.end <= time.time():
            detail = "out of time: not begun"
            rows.append({"part": part, "check": "all", "status": "skipped", "detail": detail})
            continue
        count = workers if part == "matrix" else 1
        tasks = [
            dataclasses.replace(
                template, part=part, worker=i, workers=count, deadline=deadline,
                rows=folder / f"{part}-{i}.rows",
            )
            for i in range(count)
        ]  # fmt: skip
        rows += run_part(tasks, command, environment)
    return rows
