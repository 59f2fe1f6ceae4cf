"""Long sequences through transformers: attention in tiles of a few queries.

`hf_attn` materialises the scores of a whole sequence, `num_heads * n * n` floats, several times
over. Here the same model attends tile by tile, each against the keys up to its last query: a
twentieth of the memory at 8192 tokens, and faster, since a tile stays in the processor's cache.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from attn_kernels import attend, selectable_mask
from hf_attn import VariantLlamaForCausalLM
from hf_attn.modeling import VariantLlamaAttention

TILE_SCORES = 2**19  # scores of all heads in a tile: 2 MB in float32
GPU_TILE_SCORES = 2**25  # on a GPU, which is to be busy with a tile

See = Callable[[Tensor], None]
"""Looks at a tile's weights `[batch, num_heads, queries, keys]`, the keys up to the last query."""


def attend_in_tiles(model: VariantLlamaForCausalLM, see: See | None = None) -> None:
    """Make `model` attend in tiles from now on, in place, and show the weights of each to `see`.

    It then takes whole sequences only (`use_cache=False`), and returns no attention weights.
    """
    for layer in model.model.layers:
        layer.self_attn.forward = functools.partial(_forward, layer.self_attn, see)


def project(attention: VariantLlamaAttention, hidden: Tensor) -> list[Tensor]:
    """Return queries, keys and values of `hidden [batch, n, hidden_size]` before RoPE, `[batch,
    num_heads or num_kv_heads, n, head_size]`."""
    shape = (*hidden.shape[:-1], -1, attention.head_dim)
    projections = (attention.q_proj, attention.k_proj, attention.v_proj)
    return [projection(hidden).view(shape).transpose(1, 2) for projection in projections]


def is_pruned(model: VariantLlamaForCausalLM) -> bool:
    """Return whether a model's layers keep a fixed number of tokens, which tiles cannot."""
    return any(layer.self_attn.budget is not None for layer in model.model.layers)


def _forward(
    module: VariantLlamaAttention,
    see: See | None,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor,
    position_ids: Tensor,
    past_key_values: None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """`VariantLlamaAttention.forward` without a cache: `hidden_states [batch, n, hidden_size]`,
    `attention_mask` bool `[batch, 1, n, n]`."""
    if past_key_values is not None:
        raise ValueError("attention in tiles has no cache: pass use_cache=False")
    q, k, v = project(module, hidden_states)
    q, k = module.rotate(q, k, position_embeddings, position_ids)
    q, k, v = q.float(), k.float(), v.float()
    learned = {name: getattr(module, name).float() for name in module.variant.learned}
    gates = None
    if module.variant.gated:
        gates = module.variant.gate(module.f_proj(hidden_states)).transpose(1, 2)
    batch, num_heads, n, _ = q.shape
    positions = torch.arange(n, device=q.device)
    state = q.new_zeros(batch, n)
    output = torch.empty_like(q)
    start = 0
    while start < n:
        # rows * (start + rows) scores a head
        area = (GPU_TILE_SCORES if q.is_cuda else TILE_SCORES) / (batch * num_heads)
        rows = int((math.sqrt(start**2 + 4 * area) - start) / 2)
        end = min(n, start + max(1, rows))
        queries, keys = q[:, :, start:end], k[:, :, :end]
        mask = attention_mask[:, :, start:end, :end]
        penalty = None
        if module.variant.stateful:
            window = module.config.sliding_window
            selectable = selectable_mask(positions[start:end], positions[:end], window)
            penalty, state[:, :end] = module.variant.select(
                queries, keys, selectable, module.scaling, state[:, :end]
            )
        output[:, :, start:end], weights = attend(
            module.variant,
            queries,
            keys,
            v[:, :, :end],
            mask,
            scale=module.scaling,
            learned=learned,
            penalty=penalty,
            gates=None if gates is None else gates[:, :, :end],
            positions=position_ids[:, None, start:end, None],
        )
        if see is not None:
            see(weights)
        start = end
    joined = output.transpose(1, 2).reshape(*hidden_states.shape[:-1], -1)
    return module.project(joined.to(hidden_states.dtype), hidden_states), None
