"""Attention variants as transformers attention functions.

Each variant is registered under its own name: none of them is a name of transformers' own, which
are those of implementations ("eager", "sdpa", ...), not of formulas.

The mask says everything about positions: which keys a query sees, and by their number how long its
context is. So padding, sliding windows and packed sequences need no code of their own, and a mask
is always materialised.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import and_masks, sdpa_mask, sliding_window_overlay

from attn_kernels import Variant, attend, get_variant, pruning, variant_from_config, variant_names
from hf_attn import kernels
from hf_attn.configuration import VariantLlamaConfig


def register_attention_functions() -> None:
    """Make every registered variant an `attn_implementation` of transformers."""
    for name in variant_names():
        AttentionInterface.register(name, functools.partial(attention_forward, name))
        AttentionMaskInterface.register(name, bool_mask)


def bool_mask(*args: Any, mask_function: Any, config: Any = None, **kwargs: Any) -> Tensor:
    """Return bool `[batch, 1, num_queries, num_keys]`, True where the query sees the key.

    Takes the arguments of transformers' mask functions and never returns None. A
    `VariantLlamaConfig` adds its sliding window, which Llama's own forward does not know.
    """
    if isinstance(config, VariantLlamaConfig) and config.sliding_window is not None:
        mask_function = and_masks(mask_function, sliding_window_overlay(config.sliding_window))
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    mask = sdpa_mask(*args, mask_function=mask_function, **kwargs)
    assert mask is not None
    return mask


def attention_forward(
    name: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    penalty: Tensor | None = None,
    gates: Tensor | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, Tensor | None]:
    """Attend with the variant called `name`, as transformers calls it.

    Scores, weights and their sums are in float32 (float64 for float64 inputs), also under autocast.
    Whole sequences on a GPU are computed by kernels (`kernels.usable`).

    Args:
        name: the variant; its parameters are the module's `variant`, else those that the config's
            `attention_variant` gives for this name, else the defaults.
        module: the attention module. Learned per-head tensors are attributes of it.
        query: `[batch, num_heads, num_queries, head_size]`, after RoPE.
        key: `[batch, num_kv_heads, num_keys, head_size]`.
        value: `[batch, num_kv_heads, num_keys, value_size]`.
        attention_mask: bool, as `bool_mask` makes it.
        scaling: factor of the raw scores, 1/sqrt(head_size) if None.
        dropout: must be 0.
        penalty: what a stateful variant subtracts, `[batch, num_queries, num_keys]`. Without it
            the queries must be those of all the keys.
        gates: of a gated variant, `[batch, num_heads, num_keys]` float32 or float64.
        position_ids: `[batch or 1, num_queries]`; of another shape they are not looked at.

    Returns:
        `(output [batch, num_queries, num_heads, value_size],
        weights [batch, num_heads, num_queries, num_keys])`, in the dtype of `query`; None for the
        weights that kernels do not keep.

    Raises:
        ValueError: this model or call needs something that the variant does not define, or the
            variant something that the model lacks. The message says which.
    """
    variant = _variant_of(name, module)
    if attention_mask is None or attention_mask.dtype != torch.bool:
        found = "none" if attention_mask is None else f"a mask of {attention_mask.dtype}"
        raise ValueError(
            f"{name} attention needs a bool mask [batch, 1, queries, keys], not {found}"
        )
    if dropout:
        raise ValueError(f"{name} attention has no dropout: set attention_dropout to 0")
    defined = {
        "softcap": variant.takes_modifiers,
        "s_aux": "sinks" in variant.learned,  # the module's own
        "position_bias": False,
    }
    for feature, is_defined in defined.items():
        if kwargs.get(feature) is not None and not is_defined:
            raise ValueError(f"{name} attention is not defined with this model's {feature}")
    if missing := [tensor for tensor in variant.learned if not hasattr(module, tensor)]:
        raise ValueError(
            f"{name} attention needs the learned tensor {missing[0]}, which "
            f"{type(module).__name__} lacks: use a checkpoint of VariantLlamaForCausalLM"
        )
    if variant.gated and gates is None:
        raise ValueError(
            f"{name} attention needs gates, which {type(module).__name__} does not compute: use a "
            "checkpoint of VariantLlamaForCausalLM"
        )
    if penalty is None and kernels.usable(variant, module, query, key, value, **kwargs):
        batch = query.shape[0]
        rows = kernels.rows_of(attention_mask, position_ids, batch, causal=variant.stateful)
        if rows is not None:
            output = kernels.attend(variant, module, query, key, value, rows, scaling, gates)
            return output.transpose(1, 2).contiguous().to(query.dtype), None
    positions = None
    if position_ids is not None and position_ids.dim() == 2:
        positions = position_ids[:, None, :, None]
    dtype = torch.promote_types(query.dtype, torch.float32)
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    with torch.autocast(query.device.type, enabled=False):
        q, k, v = query.to(dtype), key.to(dtype), value.to(dtype)
        if variant.stateful and penalty is None:
            if variant.kv_budgets:
                raise ValueError(
                    f"{type(module).__name__} cannot prune to kv_budgets: use a checkpoint of "
                    "VariantLlamaForCausalLM"
                )
            if q.shape[-2] != k.shape[-2]:
                raise ValueError(
                    f"{name} attention needs the earlier queries, which the cache of "
                    f"{type(module).__name__} does not hold: pass use_cache=False, or use a "
                    "checkpoint of VariantLlamaForCausalLM"
                )
        output, weights = attend(
            variant,
            q,
            k,
            v,
            attention_mask,
            scale=scaling,
            learned={tensor: getattr(module, tensor).to(dtype) for tensor in variant.learned},
            penalty=penalty,
            positions=positions,
            gates=gates,
            soft_cap=kwargs.get("softcap"),
        )
    return output.transpose(1, 2).contiguous().to(query.dtype), weights.to(query.dtype)


def selecting_head(
    query: Tensor, key: Tensor, mask: Tensor, own_key: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what later queries must know of these tokens to compute a stateful variant's penalty.

    Args:
        query: `[batch, num_heads, num_queries, head_size]`, after RoPE.
        key: `[batch, num_kv_heads, num_queries or more, head_size]`; the first `num_queries` are
            those of the same tokens.
        mask: bool `[batch, 1, num_queries, num_keys]`.
        own_key: `[num_queries]`, the column of `mask` in which each query's own key lies.

    Returns:
        `(query, key)`, each `[batch, 1, num_queries, head_size]`: head 0's query, 0 for padding
        (which does not see itself) and so selecting nothing, and head 0's key, 0 for the first
        token of a sequence (which sees itself only) and so never selected.
    """
    own_key = own_key.expand(*mask.shape[:-2], -1).unsqueeze(-1)
    is_token = mask.gather(-1, own_key)
    is_first = mask.sum(-1, keepdim=True) <= 1
    return query[:, :1] * is_token, key[:, :1] * ~is_first


def selection_penalty(
    variant: Variant, query: Tensor, key: Tensor, rows: Tensor, scaling: float
) -> Tensor:
    """Return what the queries of some rows subtract from their scores, `[batch, len(rows),
    num_keys]`.

    The penalty of every earlier query is computed again: it costs `num_keys ** 2` per call and
    leaves nothing but keys and values to keep in step when a cache is cropped or reordered.

    Args:
        variant: a stateful variant.
        query, key: `[batch, 1, num_keys, head_size]`, from `selecting_head` for every key.
        rows: `[num_queries]`, the keys whose own queries are wanted.
        scaling: factor of the raw scores.
    """
    num_keys = key.shape[-2]
    earlier = torch.ones(num_keys, num_keys, dtype=torch.bool, device=key.device).tril(-1)
    state = key.new_zeros(key.shape[0], num_keys)
    penalty, _ = variant.select(query, key, earlier, scaling, state)
    return penalty.index_select(-2, rows)


def pruned_penalty(
    variant: Variant,
    query: Tensor,
    key: Tensor,
    mask: Tensor,
    rows: Tensor,
    scaling: float,
    budget: int,
) -> tuple[Tensor, Tensor]:
    """Return what `selection_penalty` gives, and who still sees what, where a layer keeps `budget`
    tokens (`attn_kernels.pruning`).

    All tokens stay in the cache here: this shows what a server that drops them answers, and saves
    nothing. It is carried out again for the whole sequence at every call, token by token.

    Args:
        variant: a prunable variant.
        query, key, rows, scaling: as for `selection_penalty`.
        mask: bool `[batch, 1, len(rows), num_keys]`.
        budget: tokens that the layer keeps.

    Returns:
        `(penalty [batch, len(rows), num_keys], mask [batch, 1, len(rows), num_keys])`.
    """
    penalty = key.new_zeros(mask.shape[0], *mask.shape[2:])
    mask = mask.clone()
    for b in range(len(mask)):
        tokens = mask[b, 0].any(0).nonzero()[:, 0]  # the others are padding
        scores = query[b, 0, tokens] * scaling @ key[b, 0, tokens].mT
        added = pruning.fixed_point(variant.selection(scores)).tril(-1)
        before = (added.cumsum(0) - added).clamp(max=pruning.LARGEST)
        order = torch.arange(len(tokens))
        deaths, _ = pruning.evict(before.cpu(), order, 0, budget)
        index = torch.searchsorted(tokens, rows).clamp(max=len(tokens) - 1)
        alive = index[:, None] < deaths.to(rows.device)
        mask[b, 0][:, tokens] &= alive
        penalty[b][:, tokens] = before[index].to(key.dtype) / 2**pruning.FRACTION_BITS
    return penalty, mask


def _variant_of(name: str, module: nn.Module) -> Variant:
    variant: Variant | None = getattr(module, "variant", None)
    if variant is None:
        variant = variant_from_config(getattr(module, "config", {}))
    return variant if variant is not None and variant.name == name else get_variant(name)
