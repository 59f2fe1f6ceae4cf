"""Selective attention: tokens mask earlier tokens for the future."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attn_kernels.variant import PrunableVariant, register
from attn_kernels.variants.softmax import Softmax


@register
@dataclass(frozen=True)
class Selective(PrunableVariant, Softmax):
    """`w_i = softmax(x_i - F_i)`, `F_ij = sum over j < k < i of relu(x0_kj)`, `F_i0 = 0`.

    `x0` is head 0's raw score (no penalty subtracted) and `F` is subtracted in every head. `F` is
    kept as one accumulator per token and layer: query i uses it, then adds its own `relu(x0_ij)`.
    """

    name: ClassVar[str] = "selective"
    paper: ClassVar[str] = "arXiv 2410.02703"

    def selection(self, scores: Tensor) -> Tensor:
        return scores.relu()
