"""Softpick: rectified softmax, not sum-to-one, without attention sinks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attn_kernels.dense import masked_row_max
from attn_kernels.variant import Rows, Variant, VariantError, register


@register
@dataclass(frozen=True)
class Softpick(Variant):
    """`w_ij = relu(exp(x_ij) - 1) / (sum_j |exp(x_ij) - 1| + eps)`.

    A row whose scores are all <= 0 is 0. Masked keys stay out of the denominator.

    Args:
        eps: added once to the denominator in units of `exp(max(0, max_j x_ij))`, as in the
            authors' kernel.
    """

    name: ClassVar[str] = "softpick"
    paper: ClassVar[str] = "arXiv 2504.20966"

    eps: float = 1e-6

    def __post_init__(self) -> None:
        if not self.eps > 0:
            raise VariantError(f"softpick's eps must be > 0, not {self.eps!r}")

    def weights(self, scores: Tensor, rows: Rows) -> Tensor:
        # Shifting by max(0, max) instead of max is exact (a row with max <= 0 is 0 anyway) and
        # keeps exp(-shift) <= 1 when every score is far below 0.
        shift = masked_row_max(scores, rows.mask).clamp_min(0.0)
        # A masked score becomes 0, which adds exp(0) - 1 = 0. Masking p instead would leave a NaN
        # gradient: a masked score far above the row's visible maximum overflows in exp.
        scores = scores.masked_fill(~rows.mask, 0.0)
        one = torch.exp(-shift)
        # expm1 keeps small scores exact; beyond 1 the difference loses nothing and cannot overflow.
        small = torch.expm1(scores.clamp_max(1.0)) * one
        p = torch.where(scores < 1.0, small, torch.exp(scores - shift) - one)
        return p.relu() / (p.abs().sum(-1, keepdim=True) + self.eps)
