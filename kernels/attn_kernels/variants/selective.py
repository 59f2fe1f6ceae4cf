"""Selective attention: tokens mask earlier tokens for the future."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from attn_kernels.variant import Variant, VariantError, register
from attn_kernels.variants.softmax import softmax

LEAST_BUDGET = 2
"""Tokens that a layer keeps: the first, which is never evicted, and the newest."""


@register
@dataclass(frozen=True)
class Selective(Variant):
    """`w_i = softmax(x_i - F_i)`, `F_ij = sum over j < k < i of relu(x0_kj)`, `F_i0 = 0`.

    `x0` is head 0's raw score (no penalty subtracted) and `F` is subtracted in every head. `F` is
    kept as one accumulator per token and layer: query i uses it, then adds its own `relu(x0_ij)`.

    Args:
        kv_budgets: how many tokens of a request each layer keeps, in the layers' order
            (`attn_kernels.pruning`); none: all.
    """

    name: ClassVar[str] = "selective"
    paper: ClassVar[str] = "arXiv 2410.02703"
    stateful: ClassVar[bool] = True

    kv_budgets: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if self.kv_budgets and min(self.kv_budgets) < LEAST_BUDGET:
            raise VariantError(
                f"selective's kv_budgets must be at least {LEAST_BUDGET} tokens a layer, the first "
                f"and the newest, not {min(self.kv_budgets)}"
            )

    def weights(self, scores: Tensor, mask: Tensor, n: Tensor) -> Tensor:
        return softmax(scores, mask)

    def select(
        self, q: Tensor, k: Tensor, selectable: Tensor, scale: float, state: Tensor
    ) -> tuple[Tensor, Tensor]:
        x0 = (q[..., 0, :, :] * scale) @ k[..., 0, :, :].mT
        s = x0.relu().masked_fill(~selectable, 0.0)
        after = state.unsqueeze(-2) + s.cumsum(-2)
        return after - s, after[..., -1, :]
