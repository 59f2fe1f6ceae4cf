"""What is wrong is not timed: a candidate's output on the case's own data against the reference."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from attn_kernels import Variant, reference, selectable_mask
from attn_kernels.kv_quant import KVFormat
from benchmarks.kernels.candidates import Candidate
from benchmarks.kernels.case import Inputs

LIMITS = {"fp32": 2e-6, "bf16": 1e-2, "fp16": 1e-2}
"""Largest error of our kernels by dtype, relative to the largest |output| of the sampled rows."""

PEER_LIMITS = {"fp32": 1e-4, "bf16": 5e-2, "fp16": 5e-2}
"""The same for the kernels of others: enough to know that they compute the same thing."""

SAMPLES = 3
"""Rows compared: the first, the last and a random one."""

TILE = 256
"""Queries whose selections are materialised at once, in float64."""


def calls_checked(variant: Variant, inputs: Inputs) -> int:
    """Return how many calls come before the comparison.

    The first decode finds accumulators of 0, in which a wrong kernel would not show; a second one
    with the same queries reads what the first has left.
    """
    return 2 if variant.stateful and inputs.case.phase == "decode" else 1


@dataclass(frozen=True)
class Expected:
    """The float64 reference's outputs for some of a case's queries.

    Attributes:
        rows: indices into the case's `[batch * new_tokens]` queries.
        output: float64 `[len(rows), num_heads, head_dim]`.
    """

    rows: list[int]
    output: Tensor

    @classmethod
    def of(
        cls,
        variant: Variant,
        inputs: Inputs,
        learned: Mapping[str, Tensor],
        kv_format: KVFormat | None = None,
    ) -> Expected:
        """Return those of `calls_checked` calls with the same queries, on accumulators that began
        at 0; torch's global generator draws the rows."""
        case = inputs.case
        if kv_format is not None:
            key, value = (kv_format.rounded(x) for x in (inputs.key, inputs.value))
            inputs = replace(inputs, key=key, value=value)
        total = len(inputs.query)
        rows = sorted({0, total - 1, *torch.randint(total, (max(0, SAMPLES - 2),)).tolist()})
        outputs = []
        for row in rows:
            request, index = divmod(row, case.new_tokens)
            seen = case.seq_len - case.new_tokens + index + 1
            key, value = inputs.key[request].transpose(0, 1), inputs.value[request].transpose(0, 1)
            state = state_before(variant, inputs, request, index) if variant.stateful else None
            output, _ = reference.attention(
                variant,
                inputs.query[row, :, None],
                key[:, :seen],
                value[:, :seen],
                scale=inputs.scale,
                learned=learned,
                state=None if state is None else state[:seen],
                # No gate is written into the caches, which begin as zeros.
                gates=torch.zeros(case.num_heads, seen) if variant.gated else None,
            )
            outputs.append(output[:, 0])
        return cls(rows, torch.stack(outputs))

    def error(self, out: Tensor) -> float:
        """Return the largest error relative to the largest |output|; NaN if anything is.

        Args:
            out: `[batch * new_tokens, num_heads, head_dim]`.
        """
        difference = (out[self.rows].cpu().double() - self.output).abs().max()
        return float(difference / self.output.abs().max())


def state_before(variant: Variant, inputs: Inputs, request: int, index: int) -> Tensor:
    """Return a request's accumulators before its query `index` of the last call, float64
    `[seq_len]`."""
    case = inputs.case
    first = case.seq_len - case.new_tokens
    keys = torch.arange(case.seq_len)
    # The selecting head is head 0 of the queries and of the keys.
    query = inputs.query.unflatten(0, (case.batch, -1))[request, :, :1].transpose(0, 1).double()
    key = inputs.key[request, :, :1].transpose(0, 1).double()
    state = torch.zeros(case.seq_len, dtype=torch.float64)
    earlier_calls = calls_checked(variant, inputs) - 1
    for end in [case.new_tokens] * earlier_calls + [index]:
        for start in range(0, end, TILE):
            tile = slice(start, min(start + TILE, end))
            selectable = selectable_mask(first + torch.arange(tile.start, tile.stop), keys)
            _, state = variant.select(query[:, tile], key, selectable, inputs.scale, state)
    return state


def error_of(candidate: Candidate, inputs: Inputs, expected: Expected) -> float:
    """Call a fresh candidate, and return its error (`Expected.error`)."""
    for _ in range(calls_checked(candidate.variant, inputs)):
        out = candidate.run()
    return expected.error(out)


def complaint(error: float, limit: float) -> str:
    """Return why a candidate with this error must not be timed; empty if it may."""
    # "not <=": a NaN is not within any limit.
    if not error <= limit:
        return f"error {error:.1e} against the reference, limit {limit:.0e}"
    return ""
