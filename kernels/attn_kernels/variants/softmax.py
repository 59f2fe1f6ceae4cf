"""Softmax: the control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attn_kernels.dense import masked_row_max
from attn_kernels.variant import Variant, register


def softmax(scores: Tensor, mask: Tensor) -> Tensor:
    """`exp(x_ij) / sum_j exp(x_ij)` over visible keys; a row that sees no key is 0."""
    exp = (scores - masked_row_max(scores, mask)).masked_fill(~mask, -float("inf")).exp()
    # With a visible key the sum is at least 1 (the maximum's own term); the clamp is for others.
    return exp / exp.sum(-1, keepdim=True).clamp_min(1.0)


@register
@dataclass(frozen=True)
class Softmax(Variant):
    """`w_ij = exp(x_ij) / sum_j exp(x_ij)`."""

    name: ClassVar[str] = "softmax"
    paper: ClassVar[str] = "arXiv 1706.03762"

    def weights(self, scores: Tensor, mask: Tensor, n: Tensor) -> Tensor:
        return softmax(scores, mask)
