"""Dense attention for any variant, in torch operations and in the dtype of its inputs.

One function serves the float64 law, training (it is differentiable) and the serving fallback
where no kernel is built. It materialises the scores: `num_queries x num_keys` per head.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from attn_kernels.variant import Variant


def causal_mask(
    query_positions: Tensor, key_positions: Tensor, window: int | None = None
) -> Tensor:
    """Bool `[..., num_queries, num_keys]`: the query sees the key.

    Args:
        query_positions: `[..., num_queries]` integers.
        key_positions: `[..., num_keys]` integers.
        window: sliding window; a query sees itself and the `window - 1` keys before it.
    """
    distance = query_positions[..., :, None] - key_positions[..., None, :]
    mask = distance >= 0
    return mask if window is None else mask & (distance < window)


def selectable_mask(
    query_positions: Tensor, key_positions: Tensor, window: int | None = None
) -> Tensor:
    """Bool `[..., num_queries, num_keys]`: the query may mask the key for later queries.

    That is a visible key other than the query's own and other than position 0, which selective
    attention never masks.
    """
    visible = causal_mask(query_positions, key_positions, window)
    own = query_positions[..., :, None] == key_positions[..., None, :]
    return visible & ~own & (key_positions[..., None, :] != 0)


def attend(
    variant: Variant,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    *,
    scale: float | None = None,
    learned: Mapping[str, Tensor] | None = None,
    penalty: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention output and weights.

    Args:
        variant: the attention function.
        q: `[..., num_heads, num_queries, head_size]`, after RoPE and QK-norm; float32 or float64.
        k: `[..., num_kv_heads, num_keys, head_size]`; `num_heads` is a multiple of `num_kv_heads`.
        v: `[..., num_kv_heads, num_keys, value_size]`.
        mask: bool, broadcastable to `[..., num_heads, num_queries, num_keys]`.
        scale: factor of the raw scores, 1/sqrt(head_size) if None.
        learned: the variant's per-head tensors, each `[num_heads]`.
        penalty: `[..., num_queries, num_keys]`, subtracted from the scores of every head
            (`Variant.select`).

    Returns:
        `(output [..., num_heads, num_queries, value_size],
        weights [..., num_heads, num_queries, num_keys])`, in the dtype of `q`.

    Raises:
        TypeError: a 16-bit dtype, in which neither scores nor the length of a context are exact.
    """
    if q.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"attend computes in float32 or float64: convert q, k and v from {q.dtype}")
    num_kv_heads = k.shape[-3]
    n = mask.sum(-1, keepdim=True).to(q.dtype)
    q, k = variant.transform(q, k, n, learned or {})
    if variant.uses_scale:
        q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    groups = q.unflatten(-3, (num_kv_heads, -1))
    scores = (groups @ k.unsqueeze(-3).mT).flatten(-4, -3)
    if penalty is not None:
        scores = scores - penalty.unsqueeze(-3)
    weights = variant.weights(scores, mask, n)
    output = (weights.unflatten(-3, (num_kv_heads, -1)) @ v.unsqueeze(-3)).flatten(-4, -3)
    return output, weights


def masked_row_max(scores: Tensor, mask: Tensor) -> Tensor:
    """The largest visible score of each row, `[..., 1]`; 0 for a row that sees no key.

    Detached: every formula that shifts by its maximum is independent of the shift.
    """
    top = scores.detach().masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    return top.masked_fill(top == -torch.inf, 0.0)
