"""Paged attention for any variant in torch operations: correct everywhere, fast nowhere.

The serving path where no kernel is built. The cache of one layer is
`[num_blocks, num_kv_heads, block_size, content]`, in any memory order with contiguous content:
`head_size` keys (after RoPE), `head_size` values and, for a stateful variant, one float32
accumulator, of which KV head 0's is used. Scores and sums are float32 whatever the cache's dtype.
"""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from attn_kernels.batch import Batch
from attn_kernels.dense import attend, causal_mask, selectable_mask
from attn_kernels.variant import Variant

STATE_BYTES = 4
"""Size of a stateful variant's accumulator in each slot."""

QUERY_TILE = 256
"""Queries whose scores are materialised at once, which bounds the memory of a long prefill."""


def accumulators(kv_cache: Tensor, head_size: int) -> Tensor:
    """Return a view `[num_blocks, block_size]` float32 of a stateful variant's accumulators."""
    return kv_cache[:, 0, :, 2 * head_size :].view(torch.float32)[..., 0]


def write_cache(
    variant: Variant, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
) -> None:
    """Store keys and values of new tokens, in place; their accumulators start at 0.

    Args:
        key, value: `[>= num_tokens, num_kv_heads, head_size]`.
        kv_cache: the layer's cache.
        slot_mapping: `[num_tokens]`, `block * block_size + offset`, or -1 for padding.
    """
    num_tokens, head_size, block_size = slot_mapping.shape[0], key.shape[-1], kv_cache.shape[2]
    content = torch.cat([key[:num_tokens], value[:num_tokens]], -1).to(kv_cache.dtype)
    real = slot_mapping >= 0
    slots = slot_mapping[real]
    blocks, offsets = slots // block_size, slots % block_size
    kv_cache[blocks, :, offsets, : 2 * head_size] = content[real]
    if variant.stateful:
        accumulators(kv_cache, head_size)[blocks, offsets] = 0.0


def paged_attention(
    variant: Variant,
    query: Tensor,
    kv_cache: Tensor,
    block_table: Tensor,
    query_start_loc: Sequence[int],
    seq_lens: Sequence[int],
    *,
    scale: float,
    window: int | None = None,
    learned: Mapping[str, Tensor] | None = None,
    out: Tensor,
) -> None:
    """Attend with a batch whose keys and values are in the cache, decode and prefill mixed.

    A stateful variant's accumulators are advanced by these queries, so each query must come once
    and in order.

    Args:
        query: `[num_tokens, num_heads, head_size]`; request r owns
            `query_start_loc[r] : query_start_loc[r + 1]`, its last tokens.
        kv_cache: the layer's cache; slots that no query sees may hold anything.
        block_table: `[num_reqs, max_blocks]`: each request's blocks in order.
        query_start_loc: `num_reqs + 1` offsets.
        seq_lens: tokens of each request in the cache, these queries' own included.
        scale: factor of the raw scores, where the variant uses it.
        window: sliding window in tokens, the query's own included.
        learned: the variant's per-head tensors, each `[num_heads]`.
        out: `[>= num_tokens, num_heads, head_size]`, written in place.
    """
    for request, seq_len in enumerate(seq_lens):
        start, end = query_start_loc[request], query_start_loc[request + 1]
        for tile in range(start, end, QUERY_TILE):
            tile_end = min(tile + QUERY_TILE, end)
            out[tile:tile_end] = _attend_tile(
                variant,
                query[tile:tile_end],
                kv_cache,
                block_table[request],
                seq_len - (end - tile),
                scale,
                window,
                learned,
            )


class TorchLayer:
    """The torch operations bound to one layer's cache: what `attn_kernels.cpu.CPULayer` is for the
    kernels, with the same methods and arguments, and another order inside the cache's blocks."""

    def __init__(
        self,
        variant: Variant,
        kv_cache: Tensor,
        *,
        scale: float,
        window: int | None = None,
        learned: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.kv_cache = kv_cache
        self._write = functools.partial(write_cache, variant)
        self._attend = functools.partial(
            paged_attention, variant, scale=scale, window=window, learned=learned
        )

    def write_cache(self, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """See `write_cache`."""
        self._write(key, value, self.kv_cache, slot_mapping)

    def attend(
        self,
        query: Tensor,
        batch: Batch,
        out: Tensor,
    ) -> None:
        """See `paged_attention`."""
        starts, lens = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
        self._attend(query, self.kv_cache, batch.block_table, starts, lens, out=out)


def _attend_tile(
    variant: Variant,
    query: Tensor,
    kv_cache: Tensor,
    block_ids: Tensor,
    query_start: int,
    scale: float,
    window: int | None,
    learned: Mapping[str, Tensor] | None,
) -> Tensor:
    """Attend with consecutive queries `[num_queries, num_heads, head_size]` of one request, the
    first at position `query_start`, and return float32 of the same shape."""
    head_size, block_size = query.shape[-1], kv_cache.shape[2]
    num_keys = query_start + query.shape[0]
    # Blocks before the window may have been handed to another request: never read them.
    first_key = 0 if window is None else max(0, query_start - window + 1)
    queries = torch.arange(query_start, num_keys, device=query.device)
    keys = torch.arange(first_key, num_keys, device=query.device)
    blocks, offsets = block_ids[keys // block_size].long(), keys % block_size
    # Advanced indices around a slice put the tokens first: [num_keys, num_kv_heads, content].
    kv = kv_cache[blocks, :, offsets, : 2 * head_size].float().transpose(0, 1)
    q, k, v = query.float().transpose(0, 1), kv[..., :head_size], kv[..., head_size:]
    penalty = None
    if variant.stateful:
        state = accumulators(kv_cache, head_size)
        selectable = selectable_mask(queries, keys, window)
        penalty, state[blocks, offsets] = variant.select(
            q, k, selectable, scale, state[blocks, offsets]
        )
    mask = causal_mask(queries, keys, window)[None]
    output, _ = attend(variant, q, k, v, mask, scale=scale, learned=learned, penalty=penalty)
    return output.transpose(0, 1)
