"""Softmax with a learned sink: a logit a head that takes weight and gives nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attn_kernels.dense import masked_row_max
from attn_kernels.variant import Rows, Variant, register


def softmax_with_sink(scores: Tensor, mask: Tensor, sink: Tensor) -> Tensor:
    """Return `exp(x_ij) / (exp(sink) + sum_j exp(x_ij))`, 0 where masked; `sink` broadcasts to the
    rows, `[..., 1]`."""
    shift = torch.maximum(masked_row_max(scores, mask), sink.detach())
    exp = (scores - shift).masked_fill(~mask, -torch.inf).exp()
    # At least 1, the term of the shift itself, but for a row that sees no key.
    return exp / (exp.sum(-1, keepdim=True) + (sink - shift).exp()).clamp_min(1.0)


@register
@dataclass(frozen=True)
class Sinks(Variant):
    """`w_ij = exp(x_ij) / (exp(sink_h) + sum_j exp(x_ij))`, of gpt-oss, whose tensor has this name.

    A sink of 0 is softmax1; one of -infinity is softmax.
    """

    name: ClassVar[str] = "sinks"
    paper: ClassVar[str] = "arXiv 2508.10925"

    @property
    def learned(self) -> tuple[str, ...]:
        return ("sinks",)

    def initial(self, learned_name: str) -> float:
        return {"sinks": 0.0}[learned_name]

    def weights(self, scores: Tensor, rows: Rows) -> Tensor:
        return softmax_with_sink(scores, rows.mask, rows.learned["sinks"])
