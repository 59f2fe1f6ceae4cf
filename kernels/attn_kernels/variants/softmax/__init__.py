"""Softmax: the control."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attn_kernels.dense import masked_row_max
from attn_kernels.variant import Rows, Variant, register


@register
@dataclass(frozen=True)
class Softmax(Variant):
    """`w_ij = exp(x_ij) / sum_j exp(x_ij)`; the base of the variants whose weights are these."""

    name: ClassVar[str] = "softmax"
    paper: ClassVar[str] = "arXiv 1706.03762"

    def weights(self, scores: Tensor, rows: Rows) -> Tensor:
        shifted = scores - masked_row_max(scores, rows.mask)
        exp = shifted.masked_fill(~rows.mask, -torch.inf).exp()
        # A row with a visible key sums to at least 1, the maximum's own term; the others are 0.
        return exp / exp.sum(-1, keepdim=True).clamp_min(1.0)


def is_softmax(variant: Variant) -> bool:
    """Return whether the weights are softmax of the products of `transform`'s queries and keys,
    less the penalty of a stateful variant: what fused kernels of others compute."""
    cls = type(variant)
    return cls.weights is Softmax.weights and cls.score_bias is Variant.score_bias
