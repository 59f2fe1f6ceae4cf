"""Dense attention for any variant, in torch operations and in the dtype of its inputs.

One function serves the float64 reference, training (it is differentiable) and the serving fallback
where no kernel is built. It materialises the scores: `num_queries x num_keys` per head.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch import Tensor

from attn_kernels.variant import Rows, Variant


def causal_mask(
    query_positions: Tensor, key_positions: Tensor, window: int | None = None
) -> Tensor:
    """Return bool `[..., num_queries, num_keys]`: the query sees the key.

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
    """Return bool `[..., num_queries, num_keys]`: the query may mask the key for later queries.

    That is a visible key other than the query's own and other than position 0, which is
    never masked.
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
    positions: Tensor | None = None,
    gates: Tensor | None = None,
    soft_cap: float | None = None,
    alibi_slopes: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return the output of attention and its weights.

    Args:
        variant: the attention function.
        q: `[..., num_heads, num_queries, head_size]`, after RoPE and QK-norm; float32 or float64,
            as are `k` and `v`.
        k: `[..., num_kv_heads, num_keys, head_size]`; `num_heads` is a multiple of `num_kv_heads`.
        v: `[..., num_kv_heads, num_keys, value_size]`.
        mask: bool, broadcastable to `[..., num_heads, num_queries, num_keys]`.
        scale: factor of the raw scores, 1/sqrt(head_size) if None.
        learned: the variant's per-head tensors, each `[num_heads]`.
        penalty: `[..., num_queries, num_keys]`, subtracted from the scores of every head. A
            stateful variant computes it (`Variant.select`) where none is given and the queries are
            those of all the keys.
        positions: of the queries, broadcastable to `[..., num_heads, num_queries, 1]`; None: key j
            is at position j, and a query where the last key is that it sees.
        gates: `[..., num_heads, num_keys]`, of the keys' tokens (gated variants, `Variant.gate`). A
            query's own token is the last key that it sees.
        soft_cap: raw scores x become `soft_cap * tanh(x / soft_cap)`.
        alibi_slopes: `[num_heads]`; a key's score falls by its head's slope a token between the
            query and the key.

    Returns:
        `(output [..., num_heads, num_queries, value_size],
        weights [..., num_heads, num_queries, num_keys])`, in the dtype of `q`.

    Raises:
        TypeError: a 16-bit dtype, in which neither scores nor the length of a context are exact;
            two dtypes; a mask that is not bool.
        ValueError: shapes that do not fit; a learned tensor is missing, or gates; the variant takes
            no modifiers; a stateful variant's penalty is missing and cannot be computed from these
            queries.
    """
    learned = learned or {}
    _check_arguments(variant, q, k, v, mask, learned)
    check_gates(variant, gates, q.shape[-3], k.shape[-2])
    check_modifiers(variant, q.shape[-3], soft_cap, alibi_slopes)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if variant.stateful and penalty is None:
        penalty = _penalty_of_all(variant, q, k, mask, scale)
    num_kv_heads = k.shape[-3]
    learned = {name: learned[name] for name in variant.learned}
    rows = Rows.of(mask, learned, q.dtype, positions, gates)
    q, k = variant.transform(q, k, rows)
    if variant.uses_scale:
        q = q * scale
    groups = q.unflatten(-3, (num_kv_heads, -1))
    scores = (groups @ k.unsqueeze(-3).mT).flatten(-4, -3)
    if soft_cap:
        scores = soft_cap * (scores / soft_cap).tanh()
    if alibi_slopes is not None:
        scores = scores - alibi_slopes[:, None, None].to(scores.dtype) * rows.distance
    bias = variant.score_bias(rows)
    if bias is not None:
        scores = scores + bias
    if penalty is not None:
        scores = scores - penalty.unsqueeze(-3)
    weights = variant.weights(scores, rows)
    output = (weights.unflatten(-3, (num_kv_heads, -1)) @ v.unsqueeze(-3)).flatten(-4, -3)
    return output, weights


def check_gates(variant: Variant, gates: Tensor | None, num_heads: int, num_keys: int) -> None:
    """Refuse a gated variant without gates, and gates of other shapes.

    Raises:
        ValueError: with one line.
    """
    if gates is None:
        if variant.gated:
            raise ValueError(
                f"{variant.name} attention needs gates: pass gates=a tensor "
                f"[..., {num_heads}, {num_keys}], {variant.name}'s gate() of the layer's f_proj"
            )
    elif gates.shape[-2:] != (num_heads, num_keys):
        raise ValueError(
            f"gates must be [..., heads, keys] = [..., {num_heads}, {num_keys}], not "
            f"{list(gates.shape)}"
        )


def check_modifiers(
    variant: Variant, num_heads: int, soft_cap: float | None, alibi_slopes: Tensor | None
) -> None:
    """Refuse a soft cap and ALiBi where the variant does not define them.

    Raises:
        ValueError: with one line.
    """
    given = {"a soft cap": bool(soft_cap), "ALiBi": alibi_slopes is not None}
    for what, present in given.items():
        if present and not variant.takes_modifiers:
            raise ValueError(f"{variant.name} attention does not support {what}")
    if alibi_slopes is not None and alibi_slopes.shape != (num_heads,):
        raise ValueError(f"alibi_slopes is {list(alibi_slopes.shape)}, not [{num_heads}]")


def _check_arguments(
    variant: Variant, q: Tensor, k: Tensor, v: Tensor, mask: Tensor, learned: Mapping[str, Tensor]
) -> None:
    """Refuse arguments that `attend` does not define. Looks at no values."""
    if q.dtype not in (torch.float32, torch.float64):
        raise TypeError(f"attend computes in float32 or float64: convert q, k and v from {q.dtype}")
    if not q.dtype == k.dtype == v.dtype:
        raise TypeError(f"q, k and v must have one dtype, not {q.dtype}, {k.dtype} and {v.dtype}")
    if mask.dtype != torch.bool:
        raise TypeError(
            f"mask must be bool, True where the query sees the key (causal_mask), not {mask.dtype}"
        )
    if min(q.dim(), k.dim(), v.dim()) < 3:
        raise _misfit("q, k and v must be [..., heads, tokens, size]", q=q, k=k, v=v)
    if q.shape[-1] != k.shape[-1]:
        raise _misfit("q and k must have the same head size", q=q, k=k)
    if k.shape[-3:-1] != v.shape[-3:-1]:
        raise _misfit("k and v must have the same heads and keys", k=k, v=v)
    num_heads, num_kv_heads = q.shape[-3], k.shape[-3]
    if not num_kv_heads or num_heads % num_kv_heads:
        raise _misfit("the heads of q must be a multiple of those of k", q=q, k=k)
    batch = q.shape[:-3]
    if not batch == k.shape[:-3] == v.shape[:-3]:
        try:
            batch = torch.broadcast_shapes(batch, k.shape[:-3], v.shape[:-3])
        except RuntimeError:
            raise _misfit("q, k and v differ in their leading sizes", q=q, k=k, v=v) from None
    scores = (*batch, num_heads, q.shape[-2], k.shape[-2])
    sizes = zip(reversed(mask.shape), reversed(scores), strict=False)
    if mask.dim() > len(scores) or any(size != 1 and size != full for size, full in sizes):
        raise _misfit(
            f"mask must broadcast to [..., heads, queries, keys] = {list(scores)}", mask=mask
        )
    for name in variant.learned:
        if name not in learned:
            parameters = ", ".join(field.name for field in dataclasses.fields(variant))
            raise ValueError(
                f"{variant.name} attention learns {name}: pass "
                f"learned={{{name!r}: a tensor [{num_heads}]}}, or choose parameters of "
                f"{variant.name} that need none ({parameters})"
            )
        if learned[name].shape != (num_heads,):
            raise ValueError(
                f"{name} must be [num_heads] = [{num_heads}], not {list(learned[name].shape)}"
            )


def _misfit(what: str, **tensors: Tensor) -> ValueError:
    """Return the error of shapes that do not fit, with the shapes."""
    shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in tensors.items())
    return ValueError(f"{what}, not {shapes}")


def _penalty_of_all(variant: Variant, q: Tensor, k: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Return what a stateful variant's queries subtract, `[..., num_queries, num_keys]`, where
    query i is key i's own and none came before."""
    if variant.kv_budgets:
        raise ValueError(
            f"attend keeps all tokens: leave out {variant.name}'s kv_budgets, or evict with "
            "attn_kernels.pruning"
        )
    num_queries, num_keys = q.shape[-2], k.shape[-2]
    seen = mask.select(-3, 0) if mask.dim() > 2 else mask
    seen = seen.expand(*seen.shape[:-2], num_queries, num_keys)
    if num_queries != num_keys:
        raise ValueError(
            f"{variant.name} attention depends on all earlier queries: pass the {num_keys} queries "
            f"of all the keys instead of {num_queries}, or penalty (Variant.select), or call "
            "attn_kernels.reference.attention with the state"
        )
    if seen.triu(1).any():
        raise ValueError(f"{variant.name} attention is causal: no query may see a later key")
    # Padding does not see itself and selects nothing; a sequence's first token, which sees itself
    # only, is never selected.
    token = seen.diagonal(dim1=-2, dim2=-1)
    first = seen.sum(-1) <= 1
    selectable = seen.tril(-1) & token[..., :, None] & ~first[..., None, :]
    state = q.new_zeros(*torch.broadcast_shapes(q.shape[:-3], k.shape[:-3]), num_keys)
    penalty, _ = variant.select(q, k, selectable, scale, state)
    return penalty


def masked_row_max(scores: Tensor, mask: Tensor) -> Tensor:
    """Return the largest visible score of each row, `[..., 1]`; 0 for a row that sees no key.

    Detached: every formula that shifts by its maximum is independent of the shift.
    """
    row_max = scores.detach().masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    return row_max.masked_fill(row_max == -torch.inf, 0.0)
