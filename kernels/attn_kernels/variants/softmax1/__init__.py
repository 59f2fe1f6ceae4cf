"""Softmax plus one: a row may give weight to nothing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attn_kernels.variant import Rows, Variant, register
from attn_kernels.variants.sinks import softmax_with_sink


@register
@dataclass(frozen=True)
class Softmax1(Variant):
    """`w_ij = exp(x_ij) / (1 + sum_j exp(x_ij))`."""

    name: ClassVar[str] = "softmax1"
    paper: ClassVar[str] = "Miller, Attention Is Off By One (2023)"

    def weights(self, scores: Tensor, rows: Rows) -> Tensor:
        return softmax_with_sink(scores, rows.mask, scores.new_zeros(1))
