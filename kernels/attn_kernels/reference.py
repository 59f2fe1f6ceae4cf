"""The reference: attention of any variant in float64, dense.

Every kernel is compared with this. Positions are 0-based; key `j` lies at position `j` and query
`i` of a chunk at `query_start + i`, so a chunk of queries against a longer context, a prefix of
the keys and a tail of keys that no query sees are all the same call.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor
from torch.nn.functional import pad

from attn_kernels.dense import attend, causal_mask, selectable_mask
from attn_kernels.variant import Variant


def attention(
    variant: Variant,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    query_start: int | None = None,
    window: int | None = None,
    scale: float | None = None,
    learned: Mapping[str, Tensor] | None = None,
    state: Tensor | None = None,
    gates: Tensor | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """Compute causal attention of a chunk of queries, in float64.

    Args:
        variant: the attention function.
        q: `[..., num_heads, num_queries, head_size]`.
        k: `[..., num_kv_heads, num_keys, head_size]`; keys that no query sees may hold anything.
        v: `[..., num_kv_heads, num_keys, value_size]`, likewise.
        query_start: position of the first query; by default the last query is at the last key.
        window: sliding window in tokens, the query's own included; None is unlimited.
        scale: factor of the raw scores, 1/sqrt(head_size) if None.
        learned: the variant's per-head tensors, each `[num_heads]`.
        state: a stateful variant's accumulators before this chunk, `[..., <= num_keys]`; keys
            beyond it start at 0. None before the first token.
        gates: `[..., num_heads, num_keys]`, of all keys' tokens (gated variants); of keys that no
            query sees it may hold anything.
        soft_cap, alibi_slopes: as in `attend`.

    Returns:
        `(output [..., num_heads, num_queries, value_size], state [..., num_keys] or None)`.
    """
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    query_start = num_keys - num_queries if query_start is None else query_start
    if query_start < 0:
        raise ValueError(f"{num_queries} queries do not fit before key {num_keys}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    queries = torch.arange(query_start, query_start + num_queries, device=q.device)
    keys = torch.arange(num_keys, device=q.device)
    mask = causal_mask(queries, keys, window)
    unseen = ~mask.any(0)[:, None]
    q = q.double()
    k = k.double().masked_fill(unseen, 0.0)
    v = v.double().masked_fill(unseen, 0.0)
    learned = {name: tensor.double() for name, tensor in (learned or {}).items()}
    if gates is not None:
        gates = gates.double().masked_fill(unseen[:, 0], 0.0)
    penalty = None
    if variant.stateful:
        if state is None:
            state = q.new_zeros((*q.shape[:-3], 0))
        state = pad(state.double(), (0, num_keys - state.shape[-1]))
        selectable = selectable_mask(queries, keys, window)
        penalty, state = variant.select(q, k, selectable, scale, state)
    output, _ = attend(
        variant,
        q,
        k,
        v,
        mask[None],
        scale=scale,
        learned=learned,
        penalty=penalty,
        gates=gates,
        soft_cap=soft_cap,
        alibi_slopes=alibi_slopes,
    )
    return output, state
