"""Scaled cosine attention: softmax of cosines times a learned temperature a head."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor
from torch.nn.functional import normalize

from attn_kernels.variant import Rows, register
from attn_kernels.variants.softmax import Softmax

MAX_TEMPERATURE = math.log(100.0)


@register
@dataclass(frozen=True)
class Cosine(Softmax):
    """`w_ij = softmax(exp(min(t_h, ln 100)) * cos(q_i, k_j))`, of Swin Transformer V2.

    `t_h` is learned per layer and head, as the tensor `logit_scale` (the paper's code calls it so);
    it starts from ln 10. No 1/sqrt(d).
    """

    name: ClassVar[str] = "cosine"
    paper: ClassVar[str] = "arXiv 2111.09883"
    uses_scale: ClassVar[bool] = False

    @property
    def learned(self) -> tuple[str, ...]:
        return ("logit_scale",)

    def initial(self, learned_name: str) -> float:
        return {"logit_scale": math.log(10.0)}[learned_name]

    def transform(self, q: Tensor, k: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
        factor = rows.learned["logit_scale"].clamp_max(MAX_TEMPERATURE).exp()
        return normalize(q, dim=-1) * factor, normalize(k, dim=-1)
