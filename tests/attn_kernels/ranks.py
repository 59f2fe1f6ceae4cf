"""Layers of several tensor-parallel ranks as one: each has its part of the heads and a cache of its
own, and is told head 0's queries and keys."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

from attn_kernels import Variant
from attn_kernels.batch import Batch
from attn_kernels.paged import STATE_BYTES, Layer, TorchLayer, content_bytes, heads_of
from attn_kernels.pruning import Page, PageShape


def parts(ranks: int, num_heads: int, num_kv_heads: int) -> Iterator[tuple[slice, slice]]:
    """Yield each rank's heads and KV heads as vLLM shares them out: a KV head may be on several."""
    heads, kv_heads = num_heads // ranks, max(1, num_kv_heads // ranks)
    for rank in range(ranks):
        first = rank * num_kv_heads // ranks
        yield slice(rank * heads, (rank + 1) * heads), slice(first, first + kv_heads)


def empty_heads(
    variant: Variant, num_blocks: int, num_kv_heads: int, block_size: int, size: int, dtype: Any
) -> Tensor:
    """Return a rank's cache of NaN, `[num_blocks, num_kv_heads, block_size, content]`."""
    total = num_kv_heads * content_bytes(variant, size, dtype, group=1) + size * dtype.itemsize
    kv = torch.full((num_blocks, 1, block_size, total), 255, dtype=torch.uint8).view(dtype)
    return heads_of(kv, num_kv_heads, size)


class Ranks:
    """In place of one `Layer`.

    Args:
        ranks: how many.
        bind: makes a layer of a cache, a number of heads and `selector`.
        kv: the whole cache, which says the shapes.
        num_heads: of all ranks.
    """

    def __init__(
        self, ranks: int, bind: Callable[..., Any], variant: Variant, kv: Tensor, num_heads: int
    ) -> None:
        num_blocks, num_kv_heads, block_size, content = kv.shape
        size = (content - STATE_BYTES // kv.itemsize) // 2
        self.parts = list(parts(ranks, num_heads, num_kv_heads))
        self.layers = []
        for heads, kv_heads in self.parts:
            shape = num_blocks, kv_heads.stop - kv_heads.start, block_size, size
            cache = empty_heads(variant, *shape, kv.dtype)
            self.layers.append(bind(cache, num_heads=heads.stop - heads.start, selector=True))

    def write_cache(self, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        head_0 = torch.stack([torch.full_like(key[:, 0], torch.nan), key[:, 0]], 1)
        for layer, (_, kv_heads) in zip(self.layers, self.parts, strict=True):
            layer.write_cache(key[:, kv_heads], value[:, kv_heads], slot_mapping, head_0)

    def attend(self, query: Tensor, batch: Batch, out: Tensor) -> None:
        head_0 = torch.stack([query[:, 0], torch.full_like(query[:, 0], torch.nan)], 1)
        for layer, (heads, _) in zip(self.layers, self.parts, strict=True):
            part = torch.full_like(out[:, heads], torch.nan)
            layer.attend(query[:, heads], batch, part, head_0)
            out[:, heads] = part
        assert all(
            torch.equal(accumulators(layer), accumulators(self.layers[0])) for layer in self.layers
        ), "the ranks select differently"


def accumulators(layer: Layer) -> Tensor:
    """Return the bits of a layer's accumulators, and of what is in their place where there are
    none yet."""
    if isinstance(layer, TorchLayer):
        return layer.accumulators.view(torch.int32)
    blocks = layer.kv_cache[:, 0].flatten(1)
    numbers = layer.kv_cache.shape[2] * STATE_BYTES // blocks.itemsize
    return blocks[:, -numbers:].view(torch.int16)


class PrunedRanks:
    """In place of one `PrunedLayer`.

    Args:
        bind: makes a layer of a page's shape and a number of heads.
        shape: of a page of all heads.
    """

    def __init__(
        self, ranks: int, bind: Callable[..., Any], shape: PageShape, num_heads: int
    ) -> None:
        self.parts = list(parts(ranks, num_heads, shape.num_kv_heads))
        self.layers = []
        for heads, kv_heads in self.parts:
            count = kv_heads.stop - kv_heads.start
            part = PageShape(shape.budget, count, shape.head_size, shape.dtype, selector=True)
            self.layers.append(bind(part, heads.stop - heads.start))

    def step(self, query: Tensor, key: Tensor, value: Tensor, batch: Batch, out: Tensor) -> None:
        head_0 = torch.stack([query[:, 0], key[:, 0]], 1)
        for layer, (heads, kv_heads) in zip(self.layers, self.parts, strict=True):
            part = torch.full_like(out[:, heads], torch.nan)
            layer.step(query[:, heads], key[:, kv_heads], value[:, kv_heads], batch, part, head_0)
            out[:, heads] = part
        for page in batch.block_table[:, 0].tolist():
            first, *others = (
                Page.view(layer.pages[page].view(torch.uint8), layer.shape) for layer in self.layers
            )
            for other in others:
                assert torch.equal(first.positions, other.positions), "the ranks evict differently"
                assert torch.equal(first.accumulators, other.accumulators)
