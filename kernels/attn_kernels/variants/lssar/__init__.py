"""Softplus attention with length scaling and re-weighting (LSSAR)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from attn_kernels.variant import Rows, VariantError, register
from attn_kernels.variants.lssa import LSSA


@register
@dataclass(frozen=True)
class LSSAR(LSSA):
    """`w_ij` proportional to `relu(s_ij - mean_i) ** power`, with LSSA's `s_ij`.

    `mean_i` is the row's mean of `s_ij` over its visible keys, and 0 for rows that see at most
    three. This is the paper's `relu(w_ij * n_i - O) ** p` (with `O = 1`, and 0 on the first three
    rows) in a form that cannot underflow: the row's largest term is 1 before it is normalised.
    A row whose scores are all equal (within rounding) has uniform weights.

    Args:
        power: the paper's p; 15 extrapolates best in length, 3 is best at the training length.
    """

    name: ClassVar[str] = "lssar"

    power: float = 15.0

    def __post_init__(self) -> None:
        if not self.power >= 1:
            raise VariantError(f"lssar's power must be >= 1, not {self.power!r}")

    def weights(self, scores: Tensor, rows: Rows) -> Tensor:
        s, n = self.positive_scores(scores, rows.mask), rows.n
        mean = (s.sum(-1, keepdim=True) / n.clamp_min(1.0)).masked_fill(n <= 3, 0.0)
        row_max = s.amax(-1, keepdim=True)
        spread = row_max - mean
        # Rounding leaves a few units in the last place between scores that are really equal, and
        # softplus(x) = e^x, far below 0, makes |x| times as many of them. (A BLAS may add up some
        # columns in another order. The kernels do not, so that their equal scores are the same.)
        info = torch.finfo(s.dtype)
        units = 16 * (1 - row_max.detach().clamp(info.tiny, 1.0).log())
        flat = spread <= units * info.eps * row_max
        ratio = (s - mean).relu() / spread.masked_fill(flat, 1.0)
        a = torch.where(flat, torch.ones_like(s), ratio**self.power).masked_fill(~rows.mask, 0.0)
        return a / a.sum(-1, keepdim=True).clamp_min(1.0)
