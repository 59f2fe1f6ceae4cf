"""Forgetting attention (FoX): softmax of scores that decay by gates computed from the input."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from attn_kernels.variant import Rows, register
from attn_kernels.variants.softmax import Softmax


@register
@dataclass(frozen=True)
class Forgetting(Softmax):
    """`w_i = softmax(x_i + D_i)`, `D_ij = sum over j < l <= i of ln f_l`.

    `f_l = sigmoid(f_proj(input of the layer at token l))` is a forget gate, one a query head.
    """

    name: ClassVar[str] = "forgetting"
    paper: ClassVar[str] = "arXiv 2503.02130"
    gated: ClassVar[bool] = True

    def gate(self, projected: Tensor) -> Tensor:
        return logsigmoid(projected.to(torch.promote_types(projected.dtype, torch.float32)))

    def score_bias(self, rows: Rows) -> Tensor:
        return rows.decay
