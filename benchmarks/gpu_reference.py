"""The float64 reference for all queries of a case, computed where its inputs are: on the GPU.

Scores of 2048 queries against 32k keys are gigabytes in float64, so a piece of the queries is
computed at a time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from attn_kernels import Variant, reference

if TYPE_CHECKING:
    from benchmarks.gpu_peers import Peer
    from benchmarks.kernels.candidates import Ours
    from benchmarks.kernels.case import Inputs

SCORES = 1 << 25
"""Scores of a piece at most, 256 MiB; a few tensors of this size are there at once."""


def pieces(
    variant: Variant, inputs: Inputs, learned: Mapping[str, Tensor], scores: int = SCORES
) -> Iterator[tuple[slice, Tensor]]:
    """Yield the outputs of a case's last call, a piece of one request's queries at a time.

    Args:
        variant: the attention function.
        inputs: of the case; a stateful variant's accumulators begin at 0 and are advanced by the
            calls before the last (`check.calls_checked`).
        learned: the variant's per-head tensors, each `[num_heads]`.
        scores: of a piece, at most, if that is a query's or more.

    Yields:
        rows of the case's `[batch * new_tokens]` queries, and their outputs, float64
        `[rows, num_heads, head_dim]`, on the inputs' device.
    """
    from benchmarks.kernels.check import calls_checked

    case = inputs.case
    device = inputs.query.device
    first = case.seq_len - case.new_tokens
    size = max(1, scores // (case.num_heads * case.seq_len))
    # No gate is written into the caches, which begin as zeros.
    gates = torch.zeros(case.num_heads, case.seq_len, device=device) if variant.gated else None
    for request in range(case.batch):
        start_row = request * case.new_tokens
        query = inputs.query[start_row : start_row + case.new_tokens].transpose(0, 1)
        key, value = (x[request].transpose(0, 1).double() for x in (inputs.key, inputs.value))
        state = None
        for left in reversed(range(calls_checked(variant, inputs))):
            for start in range(0, case.new_tokens, size):
                stop = min(start + size, case.new_tokens)
                seen = first + stop
                output, state = reference.attention(
                    variant,
                    query[:, start:stop],
                    key[:, :seen],
                    value[:, :seen],
                    scale=inputs.scale,
                    learned=learned,
                    state=None if state is None else state[..., :seen],
                    gates=None if gates is None else gates[:, :seen],
                )
                if not left:
                    yield slice(start_row + start, start_row + stop), output.transpose(0, 1)


def expected(
    variant: Variant, inputs: Inputs, learned: Mapping[str, Tensor], scores: int = SCORES
) -> Tensor:
    """Return all outputs of `pieces`, float64 `[batch * new_tokens, num_heads, head_dim]`."""
    found = inputs.query.new_empty(inputs.query.shape, dtype=torch.float64)
    for rows, output in pieces(variant, inputs, learned, scores):
        found[rows] = output
    return found


def error_of(candidate: Ours | Peer, inputs: Inputs, outputs: Tensor) -> float:
    """Call a fresh candidate, and return the largest error of a query's outputs relative to the
    largest of them; NaN if anything is.

    Relative to each query's own: behind a long context outputs are a hundred times smaller than the
    first tokens', and an error in them must show.

    Args:
        candidate: which has not been called yet.
        inputs: of its case.
        outputs: what is `expected`.
    """
    from benchmarks.kernels.check import calls_checked

    for _ in range(calls_checked(candidate.variant, inputs)):
        out = candidate.run()
    worst = torch.zeros((), dtype=torch.float64, device=outputs.device)
    for some, wanted in zip(out.split(1024), outputs.split(1024), strict=True):
        error = (some.double() - wanted).abs().flatten(1).amax(1)
        worst = torch.maximum(worst, (error / wanted.abs().flatten(1).amax(1)).max())
    return float(worst)
