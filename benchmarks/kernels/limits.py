"""The machine's own limits, measured with torch: how fast it reads, how fast it multiplies."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from statistics import median

import torch

READ_BYTES = 512 * 2**20
"""Least size of the buffer that is read; it is also at least four times the last-level cache."""

SGEMM_SIZE = 2048


class Limit:
    """A rate that is measured again and again while other things are measured.

    Args:
        unit: of the rate: 1e9 bytes or operations per second.
        amount: bytes or operations of a method's call.
        methods: ways to do it, by name; the best one counts.
    """

    def __init__(
        self, unit: str, amount: float, methods: Mapping[str, Callable[[], object]]
    ) -> None:
        self.unit = unit
        self._amount = amount
        self._methods = methods
        for method in methods.values():
            method()  # first touch of its memory, and torch's thread pool
        self._all: dict[str, list[float]] = {name: [] for name in methods}
        self._recent: dict[str, list[float]] = {name: [] for name in methods}

    def probe(self) -> None:
        """Run every method once."""
        for name, method in self._methods.items():
            start = time.perf_counter()
            method()
            self._recent[name].append(self._amount / (time.perf_counter() - start) / 1e9)

    def take(self) -> float:
        """The rate over the probes since the last call: the best method's median."""
        recent, self._recent = self._recent, {name: [] for name in self._methods}
        for name, rates in recent.items():
            self._all[name] += rates
        return max(median(rates) for rates in recent.values())

    def summary(self) -> tuple[str, float]:
        """The best method over all that was taken, and its median."""
        medians = {name: median(rates) for name, rates in self._all.items()}
        return max(medians.items(), key=lambda item: item[1])


def read_bandwidth(last_level_cache: int) -> Limit:
    """GB/s of reading a float32 buffer much larger than the caches, all threads.

    Args:
        last_level_cache: bytes.
    """
    size = max(READ_BYTES, 4 * last_level_cache)
    columns = 4096
    buffer = torch.ones(size // 4 // columns, columns)
    vector = torch.ones(columns)
    flat = buffer.view(-1)
    methods = {
        "torch.mv": lambda: torch.mv(buffer, vector),
        "torch.sum": lambda: torch.sum(flat),
        "torch.dot": lambda: torch.dot(flat[: len(flat) // 2], flat[len(flat) // 2 :]),
    }
    return Limit("GB/s", buffer.nbytes, methods)


def sgemm_rate() -> Limit:
    """GFLOP/s of a float32 product of two 2048 x 2048 matrices."""
    a, b = torch.randn(SGEMM_SIZE, SGEMM_SIZE), torch.randn(SGEMM_SIZE, SGEMM_SIZE)
    out = torch.empty_like(a)
    return Limit("GFLOP/s", 2.0 * SGEMM_SIZE**3, {"torch.mm": lambda: torch.mm(a, b, out=out)})
