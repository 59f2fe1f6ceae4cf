"""One case: make the candidates, check each, time those that are right, in turn."""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from statistics import median
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from attn_kernels.kv_quant import KVFormat
from benchmarks.kernels.candidates import (
    Candidate,
    CopyPool,
    Ours,
    Timed,
    TorchSdpa,
    VllmSoftmax,
    Writing,
    format_of,
)
from benchmarks.kernels.case import Case, Inputs, Paging, copies_needed
from benchmarks.kernels.check import LIMITS, PEER_LIMITS, Expected, complaint, error_of
from benchmarks.results import spread

READ_BYTES = 512 * 2**20
"""Least size of the buffer that is read; it is also at least four times the last-level cache."""

SGEMM_SIZE = 2048
MOST_ROUNDS = 400


class MachineRate:
    """A rate of the machine, in 1e9 bytes or operations (`unit`) per second, that is measured again
    and again while other things are measured; `amount` is what each method's call takes, and the
    best method counts."""

    def __init__(
        self, unit: str, amount: float, methods: Mapping[str, Callable[[], object]]
    ) -> None:
        self.unit, self.amount, self.methods = unit, amount, methods
        for method in methods.values():
            method()  # first touch of its memory, and torch's thread pool
        self.rates: dict[str, list[float]] = {name: [] for name in methods}

    def probe(self) -> None:
        """Run every method twice."""
        for name, method in [*self.methods.items()] * 2:
            start = time.perf_counter()
            method()
            self.rates[name].append(self.amount / (time.perf_counter() - start) / 1e9)

    def best(self, probes: int = 0) -> tuple[str, float]:
        """Return the best method and its median rate, in the last probes or in all."""
        medians = {name: median(rates[-2 * probes :]) for name, rates in self.rates.items()}
        return max(medians.items(), key=lambda item: item[1])


def read_bandwidth(last_level_cache: int) -> MachineRate:
    """Return GB/s of reading a float32 buffer much larger than the last-level cache (bytes), with
    all threads."""
    columns = 4096
    buffer = torch.ones(max(READ_BYTES, 4 * last_level_cache) // 4 // columns, columns)
    vector, flat = torch.ones(columns), buffer.view(-1)
    halves = flat[: len(flat) // 2], flat[len(flat) // 2 :]
    methods = {
        "torch.mv": lambda: torch.mv(buffer, vector),
        "torch.sum": lambda: torch.sum(flat),
        "torch.dot": lambda: torch.dot(*halves),
    }
    return MachineRate("GB/s", buffer.nbytes, methods)


def sgemm_rate() -> MachineRate:
    """Return GFLOP/s of a float32 product of two 2048 x 2048 matrices."""
    a, b = torch.randn(SGEMM_SIZE, SGEMM_SIZE), torch.randn(SGEMM_SIZE, SGEMM_SIZE)
    out = torch.empty_like(a)
    return MachineRate(
        "GFLOP/s", 2.0 * SGEMM_SIZE**3, {"torch.mm": lambda: torch.mm(a, b, out=out)}
    )


def interleave(
    candidates: Sequence[Timed], *, seconds: float, min_rounds: int, max_rounds: int
) -> NDArray[np.float64]:
    """Time the candidates in turn, A B C A B C ..., so that all see the same noise.

    Each has been called before: there is no warm-up here. After `min_rounds`, no round begins when
    `seconds` are over, in which is what `prepare` takes.

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


def measure(
    case: Case,
    kernels: Mapping[str, Any],
    peer_isa: str,
    limit: MachineRate,
    cold_bytes: int,
    seconds: float,
    min_rounds: int,
) -> list[dict[str, Any]]:
    """Return the CSV's rows of one case: one a variant.

    `kernels` has `CPUKernel` and `QuantizedKernel` by the rows' names. A decode case's keys and
    values are copied until they take `cold_bytes`. The machine's `limit` is probed before and
    after; for `seconds` and `min_rounds` see `interleave`.
    """
    inputs = Inputs.make(case)
    copies = copies_needed(case, cold_bytes)
    paging = Paging(case, copies)
    pools: dict[str, CopyPool] = {}

    def ours(name: str) -> Ours:
        kernel = kernels[name]
        if why := kernel.unsupported(case.head_dim, case.block_size, inputs.key.dtype):
            raise ValueError(f"no {why}")
        return Ours(kernel.variant, kernel.layer, inputs, paging, pools, format_of(kernel))

    makers: dict[str, Callable[[], Candidate]] = {name: partial(ours, name) for name in kernels}
    makers["vllm"] = partial(VllmSoftmax, inputs, paging, peer_isa)
    makers["sdpa"] = partial(TorchSdpa, inputs, copies)
    expected: dict[str, Expected] = {}
    ready: dict[str, Candidate] = {}
    errors: dict[str, float] = {}
    why: dict[str, str] = {}
    for name, make in makers.items():
        errors[name] = float("nan")
        try:
            candidate = make()
            variant, kv_format = candidate.variant, format_of(candidate)
            answer = f"{variant.name} {kv_format}"
            if answer not in expected:
                expected[answer] = Expected.of(variant, inputs, candidate.learned, kv_format)
            errors[name] = error_of(candidate, inputs, expected[answer])
            limits = LIMITS if name in kernels else PEER_LIMITS
            why[name] = complaint(errors[name], limits[case.dtype])
        except (RuntimeError, ValueError) as error:
            why[name] = f"refused: {str(error).splitlines()[0]}"
        if not why[name]:
            ready[name] = candidate

    writing = case.phase == "write"
    timed: list[Timed] = [Writing(each) if writing else each for each in ready.values()]
    limit.probe()
    rounds = interleave(timed, seconds=seconds, min_rounds=min_rounds, max_rounds=MOST_ROUNDS)
    limit.probe()
    _, rate = limit.best(probes=2)
    times: dict[str, NDArray[np.float64]] = dict(zip(ready, rounds.T, strict=True))
    return [
        row(name, case, times, why, limit.unit, rate, format_of(kernel))
        | {"error": errors[name], "peer_isa": peer_isa}
        for name, kernel in kernels.items()
    ]  # fmt: skip


def row(
    name: str,
    case: Case,
    times: Mapping[str, NDArray[np.float64]],
    why: Mapping[str, str],
    unit: str,
    limit: float,
    kv_format: KVFormat | None = None,
) -> dict[str, Any]:
    """Return a variant's row from the seconds of each round of every candidate that was timed, and
    why others were not (empty: they were). `limit` is the machine's rate around this case, GFLOP/s
    for prefill, else GB/s."""
    found: dict[str, Any] = {"variant": name, "phase": case.phase, "dtype": case.dtype}
    for field in ("head_dim", "ctx", "batch", "new_tokens", "num_heads", "num_kv_heads"):
        found[field] = getattr(case, field)
    found |= {"block_size": case.block_size, "rounds": len(times.get(name, ()))}
    for prefix, who in (("ms", name), ("vllm_ms", "vllm"), ("sdpa_ms", "sdpa")):
        found |= spread(prefix, times[who] * 1e3 if who in times else ())
    for peer in ("vllm", "sdpa"):
        # Inside a round: what changes the whole machine's speed from round to round cancels.
        both = name in times and peer in times
        found[f"ratio_{peer}"] = float(np.median(times[name] / times[peer])) if both else None
    amounts = {"decode": case.bytes_in(kv_format), "write": case.written_in(kv_format)}
    amount = amounts.get(case.phase, case.flops)
    achieved = amount / (found["ms_median"] * 1e-3) / 1e9 if name in times else None
    found |= {"rate": achieved, "rate_unit": unit, "limit": limit}
    found["fraction_of_limit"] = None if achieved is None else achieved / limit
    names = {"": name, "vLLM: ": "vllm", "SDPA: ": "sdpa"}
    found["note"] = "; ".join(label + why[who] for label, who in names.items() if why[who])
    return found
