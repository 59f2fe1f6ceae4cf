"""Run tasks in this process, in several, or on a Ray cluster."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
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
Outcomes = Iterator[tuple[T, R | Failure]]


def serial(work: Callable[[T], R], tasks: Sequence[T]) -> Outcomes[T, R]:
    """Yield each task with its result or failure, one after another."""
    for task in tasks:
        yield task, attempt(work, task)


def attempt(work: Callable[[T], R], task: T) -> R | Failure:
    """Return the result, or what was raised."""
    try:
        return work(task)
    except Exception as error:
        return Failure(" ".join(f"{type(error).__name__}: {error}".split()))


def parallel(
    work: Callable[[T], R], tasks: Sequence[T], jobs: int, prepare: Callable[[int], None]
) -> Outcomes[T, R]:
    """Yield each task with its result or failure, as they are done, from `jobs` processes, each of
    which calls `prepare(jobs)` first.

    When a process is killed, the pool is lost, and with it what the other processes were at. The
    rest is then done by one process, so that only the task that kills its process fails.
    """
    waiting = dict(enumerate(tasks))
    while waiting:
        context = multiprocessing.get_context("spawn")
        with ProcessPoolExecutor(jobs, context, _start, (prepare, jobs)) as pool:
            with _deaf_to_ctrl_c():  # the processes start here
                futures = {pool.submit(attempt, work, task): i for i, task in waiting.items()}
            try:
                for done in as_completed(futures):
                    outcome = done.result()
                    yield waiting.pop(futures[done]), outcome
            except BrokenProcessPool:
                if jobs == 1:
                    yield waiting.pop(min(waiting)), KILLED
                jobs = 1
            except (KeyboardInterrupt, GeneratorExit):
                for process in multiprocessing.active_children():
                    process.terminate()
                raise


@contextlib.contextmanager
def _deaf_to_ctrl_c() -> Iterator[None]:
    """Let processes that start meanwhile be deaf to Ctrl-C, which a terminal sends to them too: the
    parent, which hears it afterwards, ends them."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _start(prepare: Callable[[int], None], jobs: int) -> None:
    """Set a worker up, to end when the parent does, even by SIGKILL."""
    parent = multiprocessing.parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    prepare(jobs)


def on_ray(work: Callable[[T], R], tasks: Sequence[T]) -> Outcomes[T, R]:
    """Do as `parallel` does, on the Ray cluster that `RAY_ADDRESS` names (else on this machine)."""
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
