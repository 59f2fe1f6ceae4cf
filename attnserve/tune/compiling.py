"""Compiling candidates side by side, in processes of their own, into Triton's cache on disk.

Nothing is launched there: a kernel that fails on the device would spoil it for its process. One
that makes the compiler fail, or end its process, or take too long, is left out.
"""

from __future__ import annotations

import functools
import multiprocessing
import queue
import signal
import threading
import time
from collections.abc import Sequence
from multiprocessing import resource_tracker
from multiprocessing.pool import Pool
from typing import Any, NamedTuple

from attn_kernels.triton.tuned import Kind
from attn_kernels.triton.tuning import GLUON, GLUON_SPILLS, Tile

SPILLS = 24
"""Most bytes of a thread that a kernel spills: ptxas does so once a program for some kernels even
where it has registers left."""

LONGEST = 60.0
"""Seconds that a candidate's kernels may take to compile, or to run for the first time."""


class Task(NamedTuple):
    """A candidate to compile for one of a kind's loads."""

    kind: Kind
    tile: Tile
    load: int


class Place(NamedTuple):
    """Where candidates are compiled."""

    device: str
    num_kv_heads: int
    tiny: bool


class Compilers:
    """Processes that compile, to be used as a context. They are started when they are needed, and
    those that do not answer are replaced."""

    def __init__(self, place: Place, jobs: int) -> None:
        self.place = place
        # "fork" would share the device's context.
        self.context = multiprocessing.get_context("spawn")
        self.pools: list[Pool | None] = [None] * jobs

    def __enter__(self) -> Compilers:
        return self

    def __exit__(self, *_: object) -> None:
        for pool in self.pools:
            if pool is not None:
                pool.terminate()

    def compile(self, tasks: Sequence[Task], deadline: float) -> dict[Task, str]:
        """Compile candidates, in this order, until a time of `time.monotonic`.

        Returns:
            what is wrong with each that there was time for: empty where nothing is.
        """
        waiting: queue.SimpleQueue[Task] = queue.SimpleQueue()
        for task in tasks:
            waiting.put(task)
        found: dict[Task, str] = {}
        given = [(index, waiting, found, deadline) for index in range(len(self.pools))]
        threads = [
            threading.Thread(target=self._work_through, args=each, daemon=True) for each in given
        ]
        for thread in threads[: len(tasks)]:
            thread.start()
        for thread in threads[: len(tasks)]:
            thread.join()
        return {task: found[task] for task in tasks if task in found}

    def _work_through(
        self, index: int, waiting: queue.SimpleQueue[Task], found: dict[Task, str], deadline: float
    ) -> None:
        """Compile what waits in one process."""
        # An interruption is for this process, which ends its compilers. (A tracker that is started
        # later would let them be interrupted again.)
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
        while (left := deadline - time.monotonic()) > 0:
            try:
                task = waiting.get_nowait()
            except queue.Empty:
                return
            pool = self.pools[index] = self.pools[index] or self.context.Pool(1)
            try:
                found[task] = pool.apply_async(compiled, (task, self.place)).get(min(left, LONGEST))
            except multiprocessing.TimeoutError:
                pool.terminate()
                self.pools[index] = None
                if left > LONGEST:
                    found[task] = f"takes more than {LONGEST:.0f} s to compile, or ends the process"


def compiled(task: Task, place: Place) -> str:
    """Compile what a layer launches with a tile; return what is wrong with it, in one line."""
    from triton.runtime.errors import OutOfResources

    kernels = compile_only()
    kernels.clear()
    try:
        work_of(task.kind, task.load, place).attend(task.tile)
        # Loading a kernel tells what it spills, and whether the device can hold it.
        loaded = [(kernel, kernel.run)[0] for kernel in kernels]
    except OutOfResources as error:
        return " ".join(str(error).split())
    except Exception as error:  # a compiler raises all kinds
        lines = [line for line in str(error).splitlines() if line.strip(" ^\t")]
        return f"{type(error).__name__}: {lines[-1].strip() if lines else 'no message'}"[:200]
    spilled = max((4 * kernel.n_spills for kernel in loaded), default=0)
    most = GLUON_SPILLS if task.tile.kernel == GLUON else SPILLS
    return f"spills {spilled} B" if spilled > most else ""


@functools.cache
def compile_only() -> list[Any]:
    """Let kernels be compiled and not launched from now on, in this process; return the list that
    they are added to. Interpreted ones run, and are not."""
    from triton.runtime.jit import JITFunction

    kernels: list[Any] = []
    run = JITFunction.run

    def compile_one(self: Any, *given: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        kernels.append(run(self, *given, grid=grid, warmup=True, **options))
        return kernels[-1]

    JITFunction.run = compile_one
    return kernels


@functools.lru_cache(1)
def work_of(kind: Kind, load: int, place: Place) -> Any:
    """Return one of the batches that a kind is timed with; on a GPU there is nothing behind it, as
    nothing is launched."""
    from attnserve.tune.work import LOADS, TINY_LOADS, Work

    loads = (TINY_LOADS if place.tiny else LOADS)[kind.phase]
    return Work(kind, loads[load], place.num_kv_heads, place.device, launched=place.tiny)
