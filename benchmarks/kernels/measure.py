"""One case: make the candidates, hold each against the law, time those that pass, in turn."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from attn_kernels import get_variant
from benchmarks.kernels import gate
from benchmarks.kernels.candidates import Kernel, Ours, Pool, TorchSdpa, VllmSoftmax
from benchmarks.kernels.case import Case, Inputs, Paging, copies_needed
from benchmarks.kernels.clock import Spread, interleave, paired_ratio
from benchmarks.kernels.gate import Law
from benchmarks.kernels.limits import Limit

AnyCandidate = Ours | VllmSoftmax | TorchSdpa


@dataclass(frozen=True)
class Budget:
    """How long a case is timed.

    Attributes:
        seconds: for all rounds together, untimed preparation included.
        min_rounds, max_rounds: rounds at least, even if they take longer, and at most.
    """

    seconds: float
    min_rounds: int = 5
    max_rounds: int = 400


@dataclass(frozen=True)
class Timing:
    """A candidate in one case.

    Attributes:
        error: against the law, relative to the largest |output|.
        why: why it was not timed; empty if it was.
        seconds: of each round; empty if it was not timed.
    """

    error: float
    why: str
    seconds: NDArray[np.float64]

    @property
    def spread(self) -> Spread | None:
        """Milliseconds."""
        return Spread.of(self.seconds * 1e3) if len(self.seconds) else None


@dataclass(frozen=True)
class Row:
    """One variant in one case.

    Attributes:
        variant: its name.
        case: the case.
        ours, vllm, sdpa: timings.
        peer_isa: vLLM's kernel.
        limit: the machine's rate around this case.
        unit: of `limit`: GB/s for decode, GFLOP/s (float32) for prefill.
    """

    variant: str
    case: Case
    ours: Timing
    vllm: Timing
    sdpa: Timing
    peer_isa: str
    limit: float
    unit: str

    def _ratio(self, peer: Timing) -> float | None:
        """Our time by the peer's; None where either failed the gate."""
        if self.ours.why or peer.why:
            return None
        return paired_ratio(self.ours.seconds, peer.seconds)

    @property
    def ratio_vllm(self) -> float | None:
        """Our time by that of vLLM's softmax kernel."""
        return self._ratio(self.vllm)

    @property
    def ratio_sdpa(self) -> float | None:
        """Our time by that of torch's dense softmax."""
        return self._ratio(self.sdpa)

    @property
    def rate(self) -> float | None:
        """What we read (decode) or compute (prefill), in `unit`."""
        spread = self.ours.spread
        if spread is None:
            return None
        amount = self.case.kv_bytes if self.case.phase == "decode" else self.case.flops
        return amount / (spread.median * 1e-3) / 1e9

    @property
    def fraction_of_limit(self) -> float | None:
        """`rate` by `limit`."""
        return None if self.rate is None else self.rate / self.limit

    @property
    def note(self) -> str:
        """What failed the gate, if anything."""
        names = {"": self.ours, "vLLM: ": self.vllm, "SDPA: ": self.sdpa}
        return "; ".join(name + timing.why for name, timing in names.items() if timing.why)


def measure(
    case: Case,
    kernels: Mapping[str, Kernel],
    peer_isa: str,
    limit: Limit,
    cold_bytes: int,
    budget: Budget,
) -> list[Row]:
    """Rows of all variants for one case.

    Args:
        case: the case.
        kernels: by variant name.
        peer_isa: for vLLM's kernel, in this dtype.
        limit: probed before and after.
        cold_bytes: a decode case's keys and values are copied until they take this much.
        budget: for the timing.
    """
    inputs = Inputs.make(case)
    copies = copies_needed(case, cold_bytes)
    paging = Paging(case, copies)
    pools: dict[str, Pool] = {}
    makers: dict[str, Callable[[], AnyCandidate]] = {
        f"ours {name}": partial(Ours, get_variant(name), kernel, inputs, paging, pools)
        for name, kernel in kernels.items()
    }
    makers["vllm"] = partial(VllmSoftmax, inputs, paging, peer_isa)
    makers["sdpa"] = partial(TorchSdpa, inputs, copies)

    laws: dict[str, Law] = {}
    ready: dict[str, AnyCandidate] = {}
    errors: dict[str, float] = {}
    why: dict[str, str] = {}
    for name, make in makers.items():
        limits = gate.LIMITS if name.startswith("ours") else gate.PEER_LIMITS
        errors[name] = float("nan")
        try:
            candidate = make()
            variant = candidate.variant
            if variant.name not in laws:
                laws[variant.name] = Law.of(variant, inputs, candidate.learned)
            errors[name] = gate.check(candidate, inputs, laws[variant.name])
            why[name] = gate.red(errors[name], limits[case.dtype])
        except (RuntimeError, ValueError) as error:
            why[name] = f"refused: {str(error).splitlines()[0]}"
        if not why[name]:
            ready[name] = candidate

    for _ in range(2):
        limit.probe()
    times = interleave(
        list(ready.values()),
        seconds=budget.seconds,
        min_rounds=budget.min_rounds,
        max_rounds=budget.max_rounds,
    )
    for _ in range(2):
        limit.probe()
    rate = limit.take()
    columns: dict[str, Any] = dict(zip(ready, times.T, strict=True))
    timings = {
        name: Timing(errors[name], why[name], columns.get(name, np.empty(0))) for name in makers
    }
    peers = timings["vllm"], timings["sdpa"]
    return [
        Row(name, case, timings[f"ours {name}"], *peers, peer_isa, rate, limit.unit)
        for name in kernels
    ]
