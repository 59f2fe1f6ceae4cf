"""Paged attention: what all kernels have in common, and torch operations for any variant, which are
correct everywhere and fast nowhere: the serving path where no kernel is built.

The cache of one layer is `[num_blocks, num_kv_heads, block_size, content]`: `head_size` keys (after
RoPE), `head_size` values and, for a stateful variant, one float32 accumulator, of which KV head 0's
is used. A gated variant has 64 bits for each query head of the KV head instead: the sum of the
gates up to the token. (float32 would not do: its steps are 0.008 at 100,000, a percent of a weight,
and small gates would be lost.) A quantized cache (`kv_quant`) is one of bytes, as many as that
takes. Scores and their sums are float32 whatever the cache's dtype.

With tensor parallelism a stateful variant's head 0 is on one rank, and all ranks need what it
selects. So each rank is given head 0's queries and keys (`selecting`), and its cache has those
keys, `[block_size, head_size]`, behind the heads of each block (`heads_of`).
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from collections.abc import Mapping

import torch
from torch import Tensor

from attn_kernels.batch import Batch
from attn_kernels.checks import check_layer, check_learned
from attn_kernels.dense import attend, causal_mask, check_modifiers, selectable_mask
from attn_kernels.kv_quant import KVFormat
from attn_kernels.variant import Variant

STATE_BYTES = 4
"""Size of a stateful variant's accumulator in each slot."""

SUM_BYTES = 8
"""Size of a gated variant's sum of gates in each slot, of each query head."""

QUERY_TILE = 256
"""Queries whose scores are materialised at once, which bounds the memory of a long prefill."""


def state_bytes(variant: Variant, group: int) -> int:
    """Return the bytes of a slot behind key and value; `group` query heads share a KV head."""
    return STATE_BYTES * variant.stateful + SUM_BYTES * group * variant.gated


def content_bytes(
    variant: Variant,
    head_size: int,
    dtype: torch.dtype,
    kv_format: KVFormat | None = None,
    *,
    group: int,
) -> int:
    """Return the bytes of a slot of one KV head, which `group` query heads share; `dtype` counts
    where nothing is quantized."""
    vector = kv_format.vector_bytes(head_size) if kv_format else head_size * dtype.itemsize
    return 2 * vector + state_bytes(variant, group)


def heads_of(kv_cache: Tensor, num_kv_heads: int, head_size: int) -> Tensor:
    """Return the heads `[num_blocks, num_kv_heads, block_size, content]` of a stateful variant's
    cache with selecting keys behind them, `[num_blocks, 1, block_size, total]`."""
    content = (kv_cache.shape[-1] - head_size) // num_kv_heads
    return kv_cache.as_strided(
        (kv_cache.shape[0], num_kv_heads, kv_cache.shape[2], content),
        (kv_cache.stride(0), kv_cache.shape[2] * content, content, 1),
    )


def head_size_of(
    variant: Variant, kv_cache: Tensor, num_heads: int, kv_format: KVFormat | None = None
) -> int:
    """Return the head size of a variant's cache.

    Raises:
        ValueError: a quantized cache is not one of bytes.
    """
    if kv_format is not None and kv_cache.itemsize != 1:
        raise ValueError(f"a cache of {kv_format} has bytes, not {kv_cache.dtype}")
    state = state_bytes(variant, num_heads // kv_cache.shape[1])
    vector = (kv_cache.shape[-1] * kv_cache.itemsize - state) // 2
    return kv_format.head_size(vector) if kv_format else vector // kv_cache.itemsize


class Layer(ABC):
    """One layer's attention, bound to its cache.

    Each subclass has an order of its own inside the blocks of each KV head: a cache is written and
    read by the same one.

    Args:
        variant: the attention function.
        kv_cache: the layer's cache; slots that no query sees may hold anything.
        num_heads: query heads, a multiple of `num_kv_heads`.
        scale: factor of the raw scores, where the variant uses it.
        window: sliding window in tokens, the query's own included.
        learned: the variant's per-head tensors, each `[num_heads]`, as they are now.
        kv_format: how keys and values are quantized; None: they are not.
        soft_cap: raw scores x become `soft_cap * tanh(x / soft_cap)`; None or 0: they do not.
        alibi_slopes: `[num_heads]`: a key's score falls by its head's slope a token of distance.
        selector: a stateful variant's head 0 is another rank's: the cache is `heads_of` one with
            selecting keys, and each call is given `selecting`.

    Raises:
        ValueError: the kernels do not support such a cache, or heads or shapes do not fit.
        KeyError: a learned tensor is missing.
    """

    def __init__(
        self,
        variant: Variant,
        kv_cache: Tensor,
        *,
        num_heads: int,
        scale: float,
        window: int | None = None,
        learned: Mapping[str, Tensor] | None = None,
        kv_format: KVFormat | None = None,
        soft_cap: float | None = None,
        alibi_slopes: Tensor | None = None,
        selector: bool = False,
    ) -> None:
        self.variant, self.kv_cache, self.num_heads = variant, kv_cache, num_heads
        self.selector = selector
        self.scale, self.window = scale, window
        self.soft_cap, self.alibi_slopes = soft_cap or None, alibi_slopes
        self.learned = {name: (learned or {})[name] for name in variant.learned}
        check_layer(num_heads, kv_cache.shape[1], window)
        self.kv_format = kv_format
        self.head_size = head_size_of(variant, kv_cache, num_heads, kv_format)
        check_modifiers(variant, num_heads, soft_cap, alibi_slopes)
        for name, tensor in self.learned.items():
            check_learned(name, tensor, num_heads)
        if selector and (kv_format is not None or not variant.stateful):
            raise ValueError("only a stateful variant's cache that is not quantized has a selector")

    @property
    def selecting_keys(self) -> Tensor:
        """A view `[num_blocks, block_size, head_size]` of the selecting keys."""
        num_blocks, num_kv_heads, block_size, _ = self.kv_cache.shape
        block_stride, head_stride = self.kv_cache.stride()[:2]
        return self.kv_cache.as_strided(
            (num_blocks, block_size, self.head_size),
            (block_stride, self.head_size, 1),
            self.kv_cache.storage_offset() + num_kv_heads * head_stride,
        )

    @abstractmethod
    def write_cache(
        self, key: Tensor, value: Tensor, slot_mapping: Tensor, selecting: Tensor | None = None
    ) -> None:
        """Store keys and values of new tokens, in place; their accumulators start at 0.

        Args:
            key, value: `[>= num_tokens, num_kv_heads, head_size]`.
            slot_mapping: `[num_tokens]` int64, `block * block_size + offset`, or -1 for padding.
            selecting: `[>= num_tokens, 2, head_size]`: head 0's queries and keys, of a selector.
        """

    @abstractmethod
    def write_gates(self, gates: Tensor, batch: Batch) -> None:
        """Store the sums of the gates up to each new token, in place (gated variants): those of its
        request's token before it and its own. Where a window of one token hides the one before,
        whose block may be another request's by now, sums begin anew.

        Args:
            gates: `[>= num_tokens, num_heads]` float32, of the batch's tokens in its order.
            batch: its requests, whose new tokens are the queries that `attend` is given.
        """

    @abstractmethod
    def attend(
        self, query: Tensor, batch: Batch, out: Tensor, selecting: Tensor | None = None
    ) -> None:
        """Attend with a batch whose keys and values are in the cache, decode and prefill mixed.

        A stateful variant's accumulators are advanced by these queries, so each query must come
        once and in order.

        Args:
            query: `[>= num_tokens, num_heads, head_size]`, float32, bfloat16 or float16.
            batch: its requests; on a GPU `max_query_len` and `max_seq_len` are given.
            out: `[>= num_tokens, num_heads, head_size]`, written in place; its heads side by side.
            selecting: as in `write_cache`, in the queries' dtype.

        Raises:
            MemoryError: no memory for scratch space.
        """

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch: Batch,
        out: Tensor,
        selecting: Tensor | None = None,
    ) -> None:
        """Store a step's tokens in the batch's slots, then attend."""
        self.write_cache(key, value, batch.slot_mapping, selecting)
        self.attend(query, batch, out, selecting)


class TorchLayer(Layer):
    """One layer's attention in torch operations; the cache has any order of memory with contiguous
    content."""

    def write_cache(
        self, key: Tensor, value: Tensor, slot_mapping: Tensor, selecting: Tensor | None = None
    ) -> None:
        num_tokens, block_size = slot_mapping.shape[0], self.kv_cache.shape[2]
        real = slot_mapping >= 0
        both, dtype = [x[:num_tokens][real] for x in (key, value)], self.kv_cache.dtype
        if self.kv_format is not None:
            both = [self.kv_format.pack(x).view(dtype) for x in both]
        content = torch.cat(both, -1).to(dtype)
        slots = slot_mapping[real]
        blocks, offsets = slots // block_size, slots % block_size
        self.kv_cache[blocks, :, offsets, : content.shape[-1]] = content
        if self.variant.stateful:
            self.accumulators[blocks, offsets] = 0.0
        if selecting is not None:
            self.selecting_keys[blocks, offsets] = selecting[:num_tokens, 1][real].to(dtype)

    def write_gates(self, gates: Tensor, batch: Batch) -> None:
        block_size, num_kv_heads = self.kv_cache.shape[2], self.kv_cache.shape[1]
        starts, lens = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
        for request, (start, end) in enumerate(itertools.pairwise(starts)):
            first = lens[request] - (end - start)
            sums = gates[start:end].double().cumsum(0)
            positions = torch.arange(first, lens[request], device=gates.device)
            blocks = batch.block_table[request].long()
            if start < end and first > 0 and self.window != 1:
                block, offset = divmod(first - 1, block_size)
                sums += self._sums(self.kv_cache[blocks[block], :, offset])
            content = sums.unflatten(1, (num_kv_heads, -1)).view(self.kv_cache.dtype)
            at = blocks[positions // block_size], slice(None), positions % block_size
            self.kv_cache[(*at, slice(-content.shape[-1], None))] = content

    def _sums(self, slots: Tensor) -> Tensor:
        """Return the sums of gates in slots `[..., num_kv_heads, content]`, `[..., num_heads]`
        float64."""
        group = self.num_heads // self.kv_cache.shape[1]
        size = SUM_BYTES * group // self.kv_cache.itemsize
        # A copy, of which alone the place in memory is a multiple of 64 bits.
        own = slots[..., -size:].clone(memory_format=torch.contiguous_format)
        return own.view(torch.float64).flatten(-2)

    def attend(
        self, query: Tensor, batch: Batch, out: Tensor, selecting: Tensor | None = None
    ) -> None:
        selectors = query[:, 0] if selecting is None else selecting[:, 0]
        starts, lens = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
        for request, (start, end) in enumerate(itertools.pairwise(starts)):
            for tile in range(start, end, QUERY_TILE):
                queries = slice(tile, min(tile + QUERY_TILE, end))
                first = lens[request] - end + tile
                table = batch.block_table[request]
                out[queries] = self._tile(query[queries], selectors[queries], table, first)

    @property
    def accumulators(self) -> Tensor:
        """A view `[num_blocks, block_size]` float32 of a stateful variant's accumulators."""
        numbers = STATE_BYTES // self.kv_cache.itemsize
        return self.kv_cache[:, 0, :, -numbers:].view(torch.float32)[..., 0]

    def _tile(self, query: Tensor, selector: Tensor, block_ids: Tensor, query_start: int) -> Tensor:
        """Attend with consecutive queries `[num_queries, num_heads, head_size]` of one request, the
        first at position `query_start`; return float32 of the same shape. `selector` is head 0's,
        `[num_queries, head_size]`."""
        size, block_size = self.head_size, self.kv_cache.shape[2]
        num_keys = query_start + query.shape[0]
        # Blocks before the window may have been handed to another request: never read them.
        first_key = 0 if self.window is None else max(0, query_start - self.window + 1)
        queries = torch.arange(query_start, num_keys, device=query.device)
        keys = torch.arange(first_key, num_keys, device=query.device)
        blocks, offsets = block_ids[keys // block_size].long(), keys % block_size
        # Advanced indices around a slice put the tokens first: [num_keys, num_kv_heads, content].
        slots = self.kv_cache[blocks, :, offsets]
        kv, gates = slots.transpose(0, 1), None
        if self.variant.gated:
            sums = self._sums(slots).mT
            gates = sums.diff(dim=-1, prepend=sums[:, :1])
        if self.kv_format is not None:
            size = self.kv_format.vector_bytes(size)
        q, k, v = query.float().transpose(0, 1), kv[..., :size], kv[..., size : 2 * size]
        if self.kv_format is not None:
            k, v = (self.kv_format.unpack(x.view(torch.uint8)) for x in (k, v))
        k, v = k.float(), v.float()
        penalty = None
        if self.variant.stateful:
            state = self.accumulators
            selectable = selectable_mask(queries, keys, self.window)
            selecting = self.selecting_keys[blocks, offsets].float()[None] if self.selector else k
            penalty, state[blocks, offsets] = self.variant.select(
                selector.float()[None], selecting, selectable, self.scale, state[blocks, offsets]
            )
        mask = causal_mask(queries, keys, self.window)[None]
        output, _ = attend(
            self.variant,
            q,
            k,
            v,
            mask,
            scale=self.scale,
            learned=self.learned,
            penalty=penalty,
            positions=queries[:, None],
            gates=gates,
            soft_cap=self.soft_cap,
            alibi_slopes=self.alibi_slopes,
        )
        return output.transpose(0, 1)
