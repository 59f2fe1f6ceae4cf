"""Tasks in several processes, some of which fail or are killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
import time
from pathlib import Path

import psutil

from quant import pool


class Unlucky(Exception):
    """Like many exceptions, it cannot be unpickled."""

    def __init__(self, text: str, number: int) -> None:
        super().__init__(text)
        self.number = number


def work(task: int) -> int:
    """Doubles; 13 raises, and a negative number kills its process."""
    if task == 13:
        raise Unlucky("thirteen", task)
    if task < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.05)
    return 2 * task


def prepare(jobs: int) -> None:
    """Nothing to set up."""
    assert jobs in (1, 2)


def test_serial_goes_on_after_a_failure() -> None:
    (one, four), (thirteen, error), (two, eight) = pool.serial(work, [1, 13, 4])
    assert (one, four, thirteen, two, eight) == (1, 2, 13, 4, 8)
    assert error == pool.Failure("Unlucky: thirteen")


def test_only_the_task_that_kills_its_process_fails() -> None:
    found = dict(pool.parallel(work, [1, 2, -1, 13, 3, 4], 2, prepare))
    assert {task: found[task] for task in (1, 2, 3, 4)} == {1: 2, 2: 4, 3: 6, 4: 8}
    assert found[13] == pool.Failure("Unlucky: thirteen")
    assert found[-1] == pool.KILLED and len(found) == 6


def run_in_a_pool(file: str) -> None:
    """Run one task that says its process and never ends, in the process that is killed below."""
    for _ in pool.parallel(say_and_wait, [file], 1, prepare):
        pass


def say_and_wait(file: str) -> None:
    """Write this process's id."""
    Path(file + ".tmp").write_text(str(os.getpid()))
    Path(file + ".tmp").rename(file)
    time.sleep(600)


def test_workers_end_with_their_parent(tmp_path: Path) -> None:
    file = tmp_path / "pid"
    parent = multiprocessing.get_context("spawn").Process(target=run_in_a_pool, args=(str(file),))
    parent.start()
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    worker = psutil.Process(int(file.read_text()))
    parent.kill()
    parent.join()
    worker.wait(timeout=60)
