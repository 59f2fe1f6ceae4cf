"""The attention maps of a checkpoint on one text, and figures of each head."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from attn_kernels.pruning import fixed_point
from attn_kernels.variant import LEAST_BUDGET
from attnserve.budgets.eviction import scan
from attnserve.errors import UserError
from attnserve.evaluation.checkpoint import Checkpoint, first_line
from attnserve.evaluation.scorers import load

SINK = 0.3
"""A head has a sink if the mean of its map's first column is above this (arXiv 2410.10781)."""

Array = NDArray[np.float64]


@dataclass(frozen=True)
class Maps:
    """What a checkpoint's heads do with one text of `n` tokens, the begin-of-text token first.

    Args:
        name: of the checkpoint.
        variant: its attention.
        weights: float32 `[layers, heads, n, n]`: what each query (row) gives each key.
        penalties: float32 `[layers, n, n]`, what a stateful variant subtracts from every head's
            scores before they become weights; None: nothing.
        kv_budgets: tokens that each layer keeps; empty: all.
    """

    name: str
    variant: str
    weights: Tensor
    penalties: Tensor | None
    kv_budgets: tuple[int, ...]

    @cached_property
    def figures(self) -> dict[str, Array]:
        """Figures of each head, `[layers, heads]`, means over the queries.

        - first token: the weight of the first key.
        - zeros: the share of keys, up to the query's own, whose weight is exactly 0.
        - entropy: of the weights divided by their sum, in nats; 0 for a row of zeros.
        - sum: of a query's weights.
        """
        weights = self.weights.double()
        n = weights.shape[-1]
        sums = weights.sum(-1)
        shares = weights / sums.clamp(min=1e-30).unsqueeze(-1)
        causal = torch.ones(n, n, dtype=torch.bool).tril()
        zeros = ((weights == 0) & causal).sum((-1, -2)) / causal.sum()
        found = {
            "first token": weights[..., 0].mean(-1),
            "zeros": zeros,
            "entropy": torch.special.entr(shares).sum(-1).mean(-1),
            "sum": sums.mean(-1),
        }
        return {name: values.double().numpy() for name, values in found.items()}

    @property
    def sink_rate(self) -> float:
        """The share of heads with a sink."""
        return float((self.figures["first token"] > SINK).mean())

    def dropped(self, budget: int) -> Tensor:
        """Return which query first misses each token where every layer keeps `budget` of them:
        int64 `[layers, n]`; n if none does."""
        assert self.penalties is not None
        n = self.penalties.shape[-1]
        if not LEAST_BUDGET <= budget < n:
            raise UserError(
                f"a budget of {budget} tokens shows nothing of {n}: name {LEAST_BUDGET} to {n - 1}"
            )
        rank = (fixed_point(self.penalties) << 31) - torch.arange(n)
        return scan(rank, 1, budget)


@torch.inference_mode()
def maps(checkpoint: Checkpoint, tokens: list[int]) -> Maps:
    """Return the maps of a checkpoint, computed in float32, on token ids.

    Raises:
        UserError: the model does not say what its attention weights are.
    """
    own = checkpoint.config.model_type == "variant_llama"
    # The registered "softmax" is a model's own attention, with its maps.
    attention: dict[str, Any] = {} if own else {"attn_implementation": "softmax"}
    try:
        model = load(checkpoint.folder, **attention)
        penalties: list[Tensor] = []
        wanted: dict[str, Any] = {"penalties": penalties} if own else {}
        ids = torch.tensor([tokens])
        output = model(input_ids=ids, use_cache=False, output_attentions=True, **wanted)
    except (ValueError, TypeError, AttributeError) as error:
        raise UserError(
            f"{checkpoint.folder} does not show its attention: {first_line(error)}"
        ) from None
    found = [each for each in output.attentions or () if each is not None]
    n = len(tokens)
    if not found or any(each.shape != (1, *found[0].shape[1:-2], n, n) for each in found):
        raise UserError(
            f"{checkpoint.folder}, a {checkpoint.config.model_type}, does not show its attention: "
            "name a decoder whose layers all have the same number of heads"
        )
    variant = getattr(model.config, "variant", None)
    return Maps(
        name=checkpoint.name,
        variant=checkpoint.variant,
        weights=torch.cat(found).float(),
        penalties=torch.cat(penalties).float() if penalties else None,
        kv_budgets=variant.kv_budgets if variant is not None else (),
    )
