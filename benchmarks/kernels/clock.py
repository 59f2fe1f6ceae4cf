"""Interleaved timing and its statistics."""

from __future__ import annotations

import gc
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


class Candidate(Protocol):
    """Something to be timed."""

    def prepare(self) -> None:
        """What comes before each call and is not timed."""

    def run(self) -> None:
        """The timed call."""


@dataclass(frozen=True)
class Spread:
    """20th percentile, median and 80th percentile."""

    p20: float
    median: float
    p80: float

    @classmethod
    def of(cls, samples: NDArray[np.float64]) -> Spread:
        """Of the samples along their only axis."""
        return cls(*(float(x) for x in np.percentile(samples, (20, 50, 80))))


def interleave(
    candidates: Sequence[Candidate], *, seconds: float, min_rounds: int, max_rounds: int
) -> NDArray[np.float64]:
    """Time the candidates in turn, A B C A B C ..., so that all see the same noise.

    Args:
        candidates: in the order of a round; each has been called before (no warm-up here).
        seconds: no further round begins after this time, `prepare` included,
        min_rounds: unless there were fewer rounds than this.
        max_rounds: rounds at most.

    Returns:
        Seconds `[rounds, candidates]`.
    """
    rounds: list[list[float]] = []
    gc.collect()
    deadline = time.perf_counter() + seconds
    while len(rounds) < min_rounds or (len(rounds) < max_rounds and time.perf_counter() < deadline):
        row = []
        for candidate in candidates:
            candidate.prepare()
            start = time.perf_counter()
            candidate.run()
            row.append(time.perf_counter() - start)
        rounds.append(row)
    return np.array(rounds)


def paired_ratio(ours: NDArray[np.float64], peer: NDArray[np.float64]) -> float:
    """Median over rounds of our time / the peer's time in the same round: what changes the whole
    machine's speed from round to round cancels."""
    return float(np.median(ours / peer))
