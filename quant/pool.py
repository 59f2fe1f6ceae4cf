"""Tasks in this process, in several, or on a Ray cluster."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Generator, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any, TypeVar

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class Failure:
    """Why there is no result, in one line. (An exception may not survive the way from a worker.)"""

    why: str


KILLED = Failure("its process was killed, probably for want of memory: lower --jobs")
Outcome = tuple[T, R | Failure]


def serial(work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[Outcome[T, R]]:
    """Each task with its result or failure, one after another."""
    for task in tasks:
        yield task, attempt(work, task)


def attempt(work: Callable[[T], R], task: T) -> R | Failure:
    """The result, or what was raised."""
    try:
        return work(task)
    except Exception as error:
        return Failure(" ".join(f"{type(error).__name__}: {error}".split()))


def parallel(
    work: Callable[[T], R], tasks: Sequence[T], jobs: int, prepare: Callable[[int], None]
) -> Iterator[Outcome[T, R]]:
    """Each task with its result or failure, as they are done, from `jobs` processes, each of
    which calls `prepare(jobs)` first.

    When one of them is killed, the pool is lost and with it what the others were at; those tasks
    are tried again, one at a time, so that only the one that kills its process fails.
    """
    suspects = yield from _window(work, list(tasks), jobs, prepare)
    for task in suspects:
        if (yield from _window(work, [task], 1, prepare)):
            yield task, KILLED


def _window(
    work: Callable[[T], R], tasks: list[T], jobs: int, prepare: Callable[[int], None]
) -> Generator[Outcome[T, R], None, list[T]]:
    """Yields as `parallel`; returns the tasks that were under way as a process died."""
    lost: list[T] = []
    while tasks:
        running: dict[Future[R | Failure], T] = {}
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, start, (prepare, jobs)) as pool:
            try:
                while tasks or running:
                    while tasks and len(running) < jobs:
                        with deaf_to_ctrl_c():  # processes start here
                            submitted = pool.submit(attempt, work, tasks[0])
                        running[submitted] = tasks.pop(0)
                    for done in wait(running, return_when=FIRST_COMPLETED).done:
                        outcome = done.result()
                        yield running.pop(done), outcome
            except BrokenProcessPool:
                lost += running.values()
            except (KeyboardInterrupt, GeneratorExit):
                for process in multiprocessing.active_children():
                    process.terminate()
                raise
    return lost


@contextlib.contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """Let processes that start meanwhile be deaf to Ctrl-C, which a terminal sends to them too: the
    parent, which hears it afterwards, ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def start(prepare: Callable[[int], None], jobs: int) -> None:
    """Set a worker up, to end when the parent does, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    prepare(jobs)


def on_ray(work: Callable[[T], R], tasks: Sequence[T]) -> Iterator[Outcome[T, R]]:
    """As `parallel`, spread over the Ray cluster that `RAY_ADDRESS` names (else this machine)."""
    import ray

    ray.init(ignore_reinit_error=True)
    remote = ray.remote(num_cpus=1, max_retries=0)(attempt)
    running: dict[Any, T] = {remote.remote(work, task): task for task in tasks}
    while running:
        (done,), _ = ray.wait(list(running), num_returns=1)
        try:
            outcome = ray.get(done)
        except Exception as error:  # a worker or its machine is gone
            outcome = Failure(" ".join(str(error).split()))
        yield running.pop(done), outcome
