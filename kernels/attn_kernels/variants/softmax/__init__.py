"""Softmax: the control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attn_kernels.dense import masked_row_max
from attn_kernels.variant import Variant, register


@register
@dataclass(frozen=True)
class Softmax(Variant):
    """`w_ij = exp(x_ij) / sum_j exp(x_ij)`; the base of the variants whose weights are these."""

    name: ClassVar[str] = "softmax"
    paper: ClassVar[str] = "arXiv 1706.03762"

    def weights(self, scores: Tensor, mask: Tensor, n: Tensor) -> Tensor:
        exp = (scores - masked_row_max(scores, mask)).masked_fill(~mask, -float("inf")).exp()
        # A row with a visible key sums to at least 1, the maximum's own term; the others are 0.
        return exp / exp.sum(-1, keepdim=True).clamp_min(1.0)
