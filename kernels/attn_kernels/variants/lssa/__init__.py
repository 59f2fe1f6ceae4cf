"""Softplus attention with length scaling (LSSA)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize, softplus

from attn_kernels.variant import Rows, Variant, register


@register
@dataclass(frozen=True)
class LSSA(Variant):
    """`s_ij = softplus(ln(d) * ln(n_i) * q^_i . k^_j)`, `w_ij = s_ij / sum_j s_ij`.

    `q^` and `k^` are l2-normalised per head and `d` is the head size. No 1/sqrt(d), nothing
    learned. The argument is at most `ln(d) * ln(n)`, so no running maximum is needed.
    """

    name: ClassVar[str] = "lssa"
    paper: ClassVar[str] = "arXiv 2501.13428"
    uses_scale: ClassVar[bool] = False

    def transform(self, q: Tensor, k: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        length_scale = math.log(q.shape[-1]) * rows.n.clamp_min(1.0).log()
        return normalize(q, dim=-1) * length_scale, normalize(k, dim=-1)

    def positive_scores(self, scores: Tensor, mask: Tensor) -> Tensor:
        """`s_ij`, 0 where masked."""
        # softplus' default is the identity above 20, which is off by 2e-9: too much for float64.
        return softplus(scores, threshold=50.0).masked_fill(~mask, 0.0)

    def weights(self, scores: Tensor, rows: Rows) -> Tensor:
        s = self.positive_scores(scores, rows.mask)
        denominator = s.sum(-1, keepdim=True)
        return s / denominator.masked_fill(denominator == 0.0, 1.0)
