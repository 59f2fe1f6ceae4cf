"""Scalable softmax (SSMax): softmax whose scores grow with the logarithm of the context."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attn_kernels.variant import Rows, register
from attn_kernels.variants.softmax import Softmax


@register
@dataclass(frozen=True)
class SSMax(Softmax):
    """`w_i = softmax((s * ln(n_i) + b) * x_i)`, which is softmax of a scaled query.

    Args:
        scale: one `s` for all heads and layers; None (the paper) means that `s` is learned per
            layer and head, as the tensor `ssmax_scale`.
        bias: a learned `b` per layer and head, as the tensor `ssmax_bias`.
    """

    name: ClassVar[str] = "ssmax"
    paper: ClassVar[str] = "arXiv 2501.19399"

    scale: float | None = None
    bias: bool = False

    @property
    def learned(self) -> tuple[str, ...]:
        return ("ssmax_scale",) * (self.scale is None) + ("ssmax_bias",) * self.bias

    def initial(self, learned_name: str) -> float:
        return {"ssmax_scale": 1.0, "ssmax_bias": 0.0}[learned_name]

    def transform(self, q: Tensor, k: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        s = rows.learned["ssmax_scale"] if self.scale is None else self.scale
        factor = s * rows.n.clamp_min(1.0).log()
        if self.bias:
            factor = factor + rows.learned["ssmax_bias"]
        return (q * factor).to(q.dtype), k
