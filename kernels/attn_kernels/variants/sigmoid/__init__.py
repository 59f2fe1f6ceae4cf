"""Sigmoid attention: each weight depends on its own score alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attn_kernels.variant import Rows, Variant, register


@register
@dataclass(frozen=True)
class Sigmoid(Variant):
    """`w_ij = sigmoid(x_ij + b)`.

    Args:
        bias: `b`, with which the authors train a model: -ln of the length of its texts. None is
            -ln(n_i) of each row, with which scores of 0 add up to nearly one in all of them.
    """

    name: ClassVar[str] = "sigmoid"
    paper: ClassVar[str] = "arXiv 2409.04431"

    bias: float | None = None

    def weights(self, scores: Tensor, rows: Rows) -> Tensor:
        bias = -rows.n.clamp_min(1.0).log() if self.bias is None else self.bias
        return (scores + bias).sigmoid().masked_fill(~rows.mask, 0.0)
