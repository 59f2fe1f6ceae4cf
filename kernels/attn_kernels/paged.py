"""Paged attention for any variant in torch operations: correct everywhere, fast nowhere.

The serving path where no kernel is built. The cache of one layer is
`[num_blocks, num_kv_heads, block_size, content]`, in any memory order with contiguous content:
`head_size` keys (after RoPE), `head_size` values and, for a stateful variant, one float32
accumulator, of which KV head 0's is used. Scores and sums are float32 whatever the cache's dtype.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import torch
from torch import Tensor

from attn_kernels.batch import Batch
from attn_kernels.dense import attend, causal_mask, selectable_mask
from attn_kernels.variant import Variant

STATE_BYTES = 4
"""Size of a stateful variant's accumulator in each slot."""

QUERY_TILE = 256
"""Queries whose scores are materialised at once, which bounds the memory of a long prefill."""


class TorchLayer:
    """One layer's attention in torch operations; `cpu.CPULayer` and `triton.TritonLayer` have the
    same methods, and another order inside the cache's blocks.

    Args:
        variant: the attention function.
        kv_cache: the layer's cache; slots that no query sees may hold anything.
        scale: factor of the raw scores, where the variant uses it.
        window: sliding window in tokens, the query's own included.
        learned: the variant's per-head tensors, each `[num_heads]`.
    """

    def __init__(
        self,
        variant: Variant,
        kv_cache: Tensor,
        *,
        scale: float,
        window: int | None = None,
        learned: Mapping[str, Tensor] | None = None,
    ) -> None:
        self.variant, self.kv_cache = variant, kv_cache
        self.scale, self.window, self.learned = scale, window, learned
        state = STATE_BYTES // kv_cache.dtype.itemsize if variant.stateful else 0
        self.head_size = (kv_cache.shape[-1] - state) // 2

    def write_cache(self, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Store keys and values of new tokens, in place; their accumulators start at 0.

        Args:
            key, value: `[>= num_tokens, num_kv_heads, head_size]`.
            slot_mapping: `[num_tokens]`, `block * block_size + offset`, or -1 for padding.
        """
        num_tokens, block_size = slot_mapping.shape[0], self.kv_cache.shape[2]
        content = torch.cat([key[:num_tokens], value[:num_tokens]], -1).to(self.kv_cache.dtype)
        real = slot_mapping >= 0
        slots = slot_mapping[real]
        blocks, offsets = slots // block_size, slots % block_size
        self.kv_cache[blocks, :, offsets, : 2 * self.head_size] = content[real]
        if self.variant.stateful:
            self.accumulators[blocks, offsets] = 0.0

    def attend(self, query: Tensor, batch: Batch, out: Tensor) -> None:
        """Attend with a batch whose keys and values are in the cache, decode and prefill mixed.

        A stateful variant's accumulators are advanced by these queries, so each query must come
        once and in order.

        Args:
            query: `[num_tokens, num_heads, head_size]`.
            batch: its requests.
            out: `[>= num_tokens, num_heads, head_size]`, written in place.
        """
        starts, lens = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
        for request, (start, end) in enumerate(itertools.pairwise(starts)):
            for tile in range(start, end, QUERY_TILE):
                queries = slice(tile, min(tile + QUERY_TILE, end))
                first = lens[request] - end + tile
                out[queries] = self._tile(query[queries], batch.block_table[request], first)

    @property
    def accumulators(self) -> Tensor:
        """A view `[num_blocks, block_size]` float32 of a stateful variant's accumulators."""
        return self.kv_cache[:, 0, :, 2 * self.head_size :].view(torch.float32)[..., 0]

    def _tile(self, query: Tensor, block_ids: Tensor, query_start: int) -> Tensor:
        """Attend with consecutive queries `[num_queries, num_heads, head_size]` of one request, the
        first at position `query_start`; return float32 of the same shape."""
        size, block_size = self.head_size, self.kv_cache.shape[2]
        num_keys = query_start + query.shape[0]
        # Blocks before the window may have been handed to another request: never read them.
        first_key = 0 if self.window is None else max(0, query_start - self.window + 1)
        queries = torch.arange(query_start, num_keys, device=query.device)
        keys = torch.arange(first_key, num_keys, device=query.device)
        blocks, offsets = block_ids[keys // block_size].long(), keys % block_size
        # Advanced indices around a slice put the tokens first: [num_keys, num_kv_heads, content].
        kv = self.kv_cache[blocks, :, offsets, : 2 * size].float().transpose(0, 1)
        q, k, v = query.float().transpose(0, 1), kv[..., :size], kv[..., size:]
        penalty = None
        if self.variant.stateful:
            state = self.accumulators
            selectable = selectable_mask(queries, keys, self.window)
            penalty, state[blocks, offsets] = self.variant.select(
                q, k, selectable, self.scale, state[blocks, offsets]
            )
        mask = causal_mask(queries, keys, self.window)[None]
        output, _ = attend(
            self.variant, q, k, v, mask, scale=self.scale, learned=self.learned, penalty=penalty
        )
        return output.transpose(0, 1)
