"""Which candidate is the fastest, and right."""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any, NamedTuple

import torch

from attn_kernels.triton.tuned import Kind
from attn_kernels.triton.tuning import Tile
from attnserve.errors import UserError
from attnserve.files import Journal
from attnserve.tune.compiling import Compilers, Task
from attnserve.tune.work import CHECKED, LIMITS, LOADS, TINY_LOADS, Work, error_of

FINALISTS = 4
"""Candidates that are timed with all loads, beside the usual tile."""

ROUNDS = 9
"""Turns that each of them has."""

WORTH = 0.99
"""A tile takes at most so much of the usual one's time, or the usual one stays."""

Clock = Callable[[], float]
"""Runs once, and says how many seconds a call took."""


class UsualTileError(Exception):
    """A kernel's usual tile fails or is wrong: there is nothing to compare with."""


class Bench(NamedTuple):
    """Where candidates run."""

    device: str
    num_kv_heads: int
    cold_bytes: int
    tiny: bool

    def works(self, kind: Kind) -> list[Work]:
        """Return the batches that a kind is timed with."""
        loads = (TINY_LOADS if self.tiny else LOADS)[kind.phase]
        return [Work(kind, load, self.num_kv_heads, self.device, self.cold_bytes) for load in loads]

    def checked(self, kind: Kind) -> Work:
        """Return the batch with which a kind is compared with the reference."""
        return Work(kind, CHECKED[kind.phase], min(2, self.num_kv_heads), self.device)


class Tiles:
    """A kind's candidates; those that failed are remembered, from earlier runs, too."""

    def __init__(self, kind: Kind, journal: Journal) -> None:
        self.kind, self.journal = kind, journal

    def name(self, tile: Tile) -> str:
        return f"failed: {self.kind}: {label(tile)}"

    def usable(self, tile: Tile) -> bool:
        return self.name(tile) not in self.journal.values

    def drop(self, tile: Tile, why: str) -> None:
        self.journal.get(self.name(tile), lambda: why)
        print(f"  {label(tile)}: {why}", file=sys.stderr)

    def attempt(self, tile: Tile, work: Callable[[], Any]) -> Any:
        """Return what `work` does with a tile; None if it fails, and then the tile is dropped.

        Raises:
            UserError: the device does not answer this process any more.
        """
        try:
            return work()
        except Exception as error:  # of a compiler or a driver
            line = " ".join(str(error).split())[:200]
            self.drop(tile, f"{type(error).__name__}: {line}")
            # An illegal address spoils the device for its process.
            if "CUDA error" in line or "HIP error" in line:
                raise UserError(
                    f"the GPU does not answer any more after {self.kind} with {label(tile)}; run "
                    "the same command again: it goes on without this tile"
                ) from None
            return None


def label(tile: Tile) -> str:
    """Return a tile as text: "rows 64, keys 32, num_warps 4, num_stages 2"."""
    return ", ".join(f"{name} {value}" for name, value in dataclasses.asdict(tile).items())


def search(
    kind: Kind,
    tiles: Sequence[Tile],
    bench: Bench,
    compilers: Compilers,
    journal: Journal,
    deadline: float,
) -> dict[str, Any]:
    """Find the fastest tile of a kernel.

    All candidates are timed with one batch, in turns, the slower half dropping out again and again;
    the last few with all batches, beside the usual tile. The first is taken whose outputs are those
    of the usual tile, and the float64 reference's.

    Args:
        kind: the kernel.
        tiles: candidates; the first is the usual tile.
        bench: where they run.
        compilers: compile the last few for the other batches.
        journal: remembers those that failed.
        deadline: of `time.monotonic`; candidates that there is no time for are left out.

    Returns:
        `tile`, its fields; `us` and `usual_us` with each batch; `ratio`, the geometric mean of
        times by the usual tile's; `timed`, how many candidates were.

    Raises:
        UsualTileError: the usual tile fails or is wrong.
        UserError: the device does not answer any more.
    """
    candidates = Tiles(kind, journal)
    works = bench.works(kind)
    for work in works:
        for copy in range(work.copies):
            work.fill(copy)
    usual, others = tiles[0], [tile for tile in tiles[1:] if candidates.usable(tile)]
    if bench.device == "cuda":
        torch.cuda.synchronize()
    began = time.monotonic()
    # Half of the time is for the final and the checks.
    clocks = _clocks(works[0], others, candidates, began + (deadline - began) / 2)
    finalists = [usual, *halved(clocks, FINALISTS)]
    compilers.compile(
        [Task(kind, tile, load) for load in range(1, len(works)) for tile in finalists], deadline
    )
    times = _final(finalists, works, candidates)
    if usual not in times:
        raise UsualTileError(f"{kind}: the usual tile, {label(usual)}, fails")
    ratios = {
        tile: math.prod(a / b for a, b in zip(seconds, times[usual], strict=True))
        ** (1 / len(works))
        for tile, seconds in times.items()
    }
    for tile in sorted(ratios, key=ratios.__getitem__):
        if ratios[tile] > WORTH:
            tile = usual
        if why := wrong(tile, usual, works, bench.checked(kind)):
            candidates.drop(tile, why)
            if tile == usual:
                raise UsualTileError(f"{kind}: the usual tile, {label(usual)}: {why}")
            continue
        break
    micro = {t: [float(f"{1e6 * s:.6g}") for s in times[t]] for t in (tile, usual)}
    return {
        "tile": dataclasses.asdict(tile),
        "us": micro[tile],
        "usual_us": micro[usual],
        "ratio": float(f"{ratios[tile]:.4g}"),
        "timed": len(clocks) + 1,
    }


def _clocks(
    work: Work, tiles: Sequence[Tile], candidates: Tiles, deadline: float
) -> dict[Tile, Clock]:
    """Return what times each tile that works, and that there is time for."""
    found: dict[Tile, Clock] = {}
    for tile in tiles:
        if time.monotonic() > deadline:
            break
        clock = candidates.attempt(tile, partial(work.timed, tile))
        if clock is not None:
            found[tile] = clock
    return found


def halved(clocks: Mapping[Tile, Clock], most: int) -> list[Tile]:
    """Return the `most` fastest, the fastest first: the slower half drops out again and again, and
    the others are timed twice as often."""
    left, turns = list(clocks), 1
    while True:
        times = in_turns({tile: clocks[tile] for tile in left}, turns)
        left.sort(key=times.__getitem__)
        if len(left) <= most:
            return left
        left = left[: max(most, (len(left) + 1) // 2)]
        turns *= 2


def in_turns(clocks: Mapping[Tile, Clock], turns: int) -> dict[Tile, float]:
    """Return the median seconds of each, after one run that does not count."""
    times: dict[Tile, list[float]] = {tile: [] for tile in clocks}
    for turn in range(turns + 1):
        for tile in list(clocks)[:: -1 if turn % 2 else 1]:
            times[tile].append(clocks[tile]())
    return {tile: median(seconds[1:]) for tile, seconds in times.items()}


def _final(
    tiles: Sequence[Tile], works: Sequence[Work], candidates: Tiles
) -> dict[Tile, list[float]]:
    """Return the seconds of each tile with each batch; of those that work with all of them."""
    found: dict[Tile, list[float]] = {tile: [] for tile in tiles}
    for work in works:
        clocks = _clocks(work, list(found), candidates, math.inf)
        times = in_turns(clocks, ROUNDS if work.kv.is_cuda else 1)
        found = {tile: [*found[tile], seconds] for tile, seconds in times.items()}
    return found


def wrong(tile: Tile, usual: Tile, works: Sequence[Work], checked: Work) -> str:
    """Return what is wrong with a tile's outputs, in words; empty: nothing."""
    of_one = LIMITS[checked.kind.dtype]
    # Two tiles' outputs may be off in opposite directions.
    comparisons = [("the usual tile's", work, work.outputs(usual), 2 * of_one) for work in works]
    comparisons.append(("the reference", checked, checked.expected(), of_one))
    for name, work, wanted, limit in comparisons:
        error = error_of(work.outputs(tile), wanted)
        if not error <= limit:  # NaN is not within any limit
            return f"its outputs are off by {error:.1e} from {name}, limit {limit:.0e}"
    return ""
