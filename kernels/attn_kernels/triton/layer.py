"""The kernels bound to one layer's cache, or its pages within a budget: what
`attn_kernels.cpu.kernel` is on a CPU."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections import defaultdict
from typing import Any

import torch
import triton
from torch import Tensor

from attn_kernels.batch import Batch, heads_together
from attn_kernels.paged import Layer
from attn_kernels.pruning import LARGEST_GPU_BUDGET, PageShape, PrunedLayer
from attn_kernels.triton import pruned, tuned
from attn_kernels.triton.attention import (
    OUTPUT,
    STATISTICS,
    WHOLE,
    attend_kernel,
    merge_kernel,
)
from attn_kernels.triton.cache import write_kernel
from attn_kernels.triton.gates import write_gates_kernel
from attn_kernels.triton.launch import Launcher, compiling
from attn_kernels.triton.selections import advance_kernel, select_kernel
from attn_kernels.triton.special import INTERPRETED
from attn_kernels.triton.tiles import Shape, Tiling
from attn_kernels.triton.tuning import (
    DECODE,
    GLUON,
    LARGEST_ROWS,
    PREFILL,
    SHARED_MEMORY,
    Tile,
    kind_of_variant,
    parts_for,
    tile_for,
)
from attn_kernels.triton.variant import constants, functions
from attn_kernels.variant import Variant

QUANTIZED = (torch.float8_e4m3fn, torch.int8)
"""Cache dtypes that need scales."""

MOST_SCORES = 2**25
"""Scores of a step that are kept between two passes, 128 MiB; of longer contexts they are computed
again."""


ONE_WARP = {"enable_fp_fusion": True, "num_warps": 1}
FOUR_WARPS = {"enable_fp_fusion": True, "num_warps": 4}

_buffers: defaultdict[tuple[torch.device, str], list[Tensor]] = defaultdict(list)


def scratch(device: torch.device, name: str, *shape: int) -> Tensor:
    """Return float32 memory of a step, shared by a device's layers: good until it is asked for by
    this name again. Where kernels are only compiled, there is none behind it."""
    if compiling():
        return torch.empty(shape, device="meta")
    count = math.prod(shape)
    buffers = _buffers[device, name]
    if not buffers or buffers[-1].numel() < count:
        # The smaller ones stay: a captured graph may still write there. (One that is made while a
        # graph is captured is of that graph's memory, and stays, too.)
        buffers.append(torch.empty(count, device=device))
    return buffers[-1][:count].view(shape)


class TritonLayer(Layer):
    """One layer's attention on a GPU. No call waits for the device.

    Inside each block of each KV head lie all keys, then all values, then the accumulators or the
    sums of gates.

    Args:
        variant: the attention function.
        kv_cache: the layer's cache, the last two dimensions contiguous; float32, bfloat16, float16,
            (with scales) float8_e4m3fn or int8, or (with a `kv_format`) bytes.
        key_scale, value_scale: `[1]` float32: a quantized cache holds keys and values divided by
            them.
        arch: "sm_90", "gfx942"; the device's if None.
        options: those of `Layer`.
    """

    def __init__(
        self,
        variant: Variant,
        kv_cache: Tensor,
        *,
        key_scale: Tensor | None = None,
        value_scale: Tensor | None = None,
        arch: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(variant, kv_cache, **options)
        if self.kv_format is not None:
            self.kv_cache = kv_cache = kv_cache.view(torch.int8)
        num_kv_heads, block_size, content = kv_cache.shape[1:]
        if kv_cache.stride()[2:] != (content, 1):
            raise ValueError("the interior of the cache's blocks must be contiguous")
        self.quantized = self.kv_format is None and kv_cache.dtype in QUANTIZED
        if self.quantized and (key_scale is None or value_scale is None):
            raise ValueError(f"a cache of {kv_cache.dtype} needs key_scale and value_scale")
        self.num_kv_heads, self.group = num_kv_heads, self.num_heads // num_kv_heads
        self.device = kv_cache.device
        self.strides = kv_cache.stride()[:2]
        self.arch, self.num_multiprocessors = device_figures(self.device)
        self.arch = arch or self.arch
        tensors = [tensor.float().contiguous() for tensor in self.learned.values()]
        self.two_learned = (*tensors, None, None)[:2]
        self.slopes = None if self.alibi_slopes is None else self.alibi_slopes.float().contiguous()
        self.scales = (key_scale, value_scale) if self.quantized else (None, None)
        dims = triton.next_power_of_2(self.head_size)
        self.shape = Shape(
            num_kv_heads, self.group, self.head_size, dims, block_size, self.window or 0,
            self.soft_cap or 0.0, self.slopes is not None, self.quantized,
            self.kv_format.bits if self.kv_format else 0, num_kv_heads if self.selector else 0,
        )  # fmt: skip
        given = self.given = {**functions(variant), "SHAPE": self.shape}
        self.two_passes = given["UPDATE_STATISTICS"] is not None
        self.most_scores: float = MOST_SCORES
        self.tiles: dict[tuple[str, torch.dtype, bool], Tile] = {}
        self.kind = kind_of_variant(variant, given["VARIANT"].unit_keys)
        given |= {"STATEFUL": variant.stateful}
        given["LARGEST"] = 127.0 if self.kv_cache.dtype == torch.int8 else 448.0
        self.launch = {
            kernel: Launcher(kernel, constants(kernel, given))
            for kernel in (
                attend_kernel, merge_kernel, select_kernel, advance_kernel, write_kernel,
                write_gates_kernel,
            )
        }  # fmt: skip

    def write_cache(
        self, key: Tensor, value: Tensor, slot_mapping: Tensor, selecting: Tensor | None = None
    ) -> None:
        if slot_mapping.shape[0] == 0:
            return
        key, value = heads_together(key), heads_together(value)
        head_0 = None if selecting is None else selecting[:, 1].to(self.kv_cache.dtype)
        self.launch[write_kernel](
            (slot_mapping.shape[0], self.num_kv_heads + self.selector),
            key, value, head_0, self.kv_cache, slot_mapping, *self.scales,
            key.stride(0), value.stride(0), 0 if head_0 is None else head_0.stride(0),
            *self.strides, options=ONE_WARP,
        )  # fmt: skip

    def write_gates(self, gates: Tensor, batch: Batch) -> None:
        gates = gates.float().contiguous()
        self.launch[write_gates_kernel](
            (batch.seq_lens.shape[0], self.num_heads),
            gates, self.kv_cache, batch.block_table, batch.query_start_loc, batch.seq_lens,
            gates.stride(0), *self.strides, batch.block_table.stride(0),
            options=ONE_WARP, TOKENS=16 if batch.max_query_len == 1 else 128,
        )  # fmt: skip

    def attend(
        self, query: Tensor, batch: Batch, out: Tensor, selecting: Tensor | None = None
    ) -> None:
        query = heads_together(query)
        selectors = query[:, 0] if selecting is None else selecting[:, 0].to(query.dtype)
        if query.shape[0] == 0:
            return
        if batch.halves:
            count = batch.num_decodes
            for half, tokens in zip(batch.halves, (slice(count), slice(count, None)), strict=True):
                given = None if selecting is None else selecting[tokens]
                self.attend(query[tokens], half, out[tokens], given)
            return
        self._attend(query, selectors, batch, out)

    def tile(self, phase: str, dtype: torch.dtype, num_tokens: int) -> Tile:
        """Return the tile of so many queries."""
        rows = num_tokens * self.num_heads
        many = rows // LARGEST_ROWS >= 2 * self.num_multiprocessors
        if (known := tuned.trial() or self.tiles.get((phase, dtype, many))) is not None:
            return known
        kind = tuned.kind_of(
            phase, self.variant.name, dtype, self.kv_cache.dtype, self.head_size, self.group,
            self.shape.block_size, self.shape.kv_bits, many,
        )  # fmt: skip
        size = self.head_size, dtype.itemsize, self.group, self.shape.kv_bits
        tile = tuned.tuned_tile(kind, self.arch, self.device)
        if tile is not None and tile.kernel == GLUON and self.gluon is None:
            tile = None
        tile = tile or tile_for(phase, self.arch, *size, self.kind, many)
        return self.tiles.setdefault((phase, dtype, many), tile)

    @functools.cached_property
    def gluon(self) -> Any:
        """The kernel for Hopper, bound to the cache; None where it does not do what this layer
        needs, or Triton has no Gluon as it expects."""
        try:
            from attn_kernels.triton import hopper
        except (ImportError, AttributeError):  # which Triton calls experimental
            return None
        if INTERPRETED or not hopper.takes(self.given, self.shape, self.kv_cache):
            return None
        return hopper.Prefill(self.given, self.kv_cache)

    def _attend(self, query: Tensor, selectors: Tensor, batch: Batch, out: Tensor) -> None:
        """Launch the kernels."""
        num_reqs, num_tokens = batch.seq_lens.shape[0], query.shape[0]  # padding included
        phase = DECODE if batch.max_query_len == 1 else PREFILL
        decode, tile = phase == DECODE, self.tile(phase, query.dtype, num_tokens)
        queries = 1 if decode else tile.queries(self.group)
        tiles = num_tokens if decode else num_tokens // queries + num_reqs
        programs = tiles * self.num_kv_heads
        parts = parts_for(phase, programs, self.num_multiprocessors, batch.max_seq_len)
        two_pass = parts > 1 and self.two_passes
        most_keys = -(-batch.max_seq_len // tile.keys) * tile.keys
        of_scores = (num_tokens, self.num_heads, most_keys)
        keeps_scores = two_pass and math.prod(of_scores) <= self.most_scores
        selectors_of_tile = max(16, 1 << (queries - 1).bit_length())
        cut = Tiling(decode, tile.rows, queries, selectors_of_tile, tile.keys, parts, keeps_scores)
        part_rows = part_outputs = statistics = scores = snapshots = None
        if parts > 1:
            of_parts = (num_tokens, self.num_heads, parts)
            part_rows = scratch(self.device, "part_rows", *of_parts, 2)
            part_outputs = scratch(self.device, "part_outputs", *of_parts, self.head_size)
            if two_pass:
                statistics = scratch(self.device, "statistics", *of_parts, 2)
            if keeps_scores:
                scores = scratch(self.device, "scores", *of_scores)
        if self.variant.stateful and not decode:
            snapshots = self._select(selectors, batch, tile, cut, tiles)
        scale = self.scale if self.variant.uses_scale else 1.0
        if tile.kernel == GLUON:
            self.gluon(
                (programs, parts), out, query, batch, self.two_learned, (part_rows, part_outputs),
                scale, tile, cut,
            )  # fmt: skip
        passes = (STATISTICS, OUTPUT) if two_pass else (WHOLE,)
        for only in () if tile.kernel == GLUON else passes:
            self.launch[attend_kernel](
                (programs, parts),
                out, query, selectors, self.kv_cache, batch.block_table, batch.query_start_loc,
                batch.seq_lens, *self.two_learned, self.slopes, snapshots, statistics, scores,
                part_rows, part_outputs,
                *self.scales, scale, num_reqs,
                query.stride(0), selectors.stride(0), out.stride(0), *self.strides,
                batch.block_table.stride(0), 0 if snapshots is None else snapshots.stride(0),
                most_keys, options=tile.options, TILE=cut, PASS=only,
            )  # fmt: skip
        if parts > 1:
            self.launch[merge_kernel](
                (num_tokens, self.num_heads),
                out, query, part_rows, part_outputs, batch.query_start_loc, batch.seq_lens,
                *self.two_learned, num_reqs, query.stride(0), out.stride(0),
                options=FOUR_WARPS, SPLITS=parts,
            )  # fmt: skip
        if self.variant.stateful and decode:  # what this step's queries add is for the next one's
            self._select(selectors, batch, tile, cut, tiles)

    def _select(
        self, selectors: Tensor, batch: Batch, tile: Tile, cut: Tiling, tiles: int
    ) -> Tensor | None:
        """Advance the accumulators, and return those ahead of each tile, `[tiles, keys]`, but of a
        decode."""
        key_tiles, snapshots = -(-batch.max_seq_len // tile.keys), None
        if not cut.decode:
            snapshots = scratch(self.device, "snapshots", tiles, key_tiles * tile.keys)
        stride = 0 if snapshots is None else snapshots.stride(0)
        strides = *self.strides, batch.block_table.stride(0), stride
        # Under a CUDA graph the longest context is the model's, and most programs would be idle.
        sharing = min(key_tiles, -(-8 * self.num_multiprocessors // tiles))
        self.launch[select_kernel](
            (tiles, sharing),
            selectors, self.kv_cache, batch.block_table, batch.query_start_loc, batch.seq_lens,
            snapshots, self.scales[0], self.scale, batch.seq_lens.shape[0],
            selectors.stride(0), *strides, options=tile.options, TILE=cut,
        )  # fmt: skip
        if snapshots is not None:
            self.launch[advance_kernel](
                (batch.seq_lens.shape[0], key_tiles),
                self.kv_cache, batch.block_table, batch.query_start_loc, batch.seq_lens, snapshots,
                *strides, options=FOUR_WARPS, QUERIES=cut.queries, TILES=16, KEYS=tile.keys,
            )  # fmt: skip
        return snapshots


class TritonPrunedLayer(PrunedLayer):
    """One layer's attention within a budget on a GPU. No call waits for the device, and what is
    launched depends only on the numbers of tokens and requests and on the batch's most queries of
    a request.

    Args:
        arch: "sm_90", "gfx942"; the device's if None.
        options: those of `PrunedLayer`.
    """

    chunk = pruned.CHUNK
    """Most tokens of a request that are processed at once: a power of 2, at least 16."""

    def __init__(
        self,
        variant: Variant,
        pages: Tensor,
        shape: PageShape,
        *,
        arch: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(variant, pages.view(shape.dtype), shape, **options)
        if shape.budget > LARGEST_GPU_BUDGET:
            raise ValueError(
                f"the GPU kernels take budgets to {LARGEST_GPU_BUDGET}, not {shape.budget}"
            )
        self.num_kv_heads, self.head_size = shape.num_kv_heads, shape.head_size
        self.device, self.selector = pages.device, shape.selector
        group = self.num_heads // shape.num_kv_heads
        self.page = pruned.PagedSlots(
            shape.num_kv_heads,
            group,
            shape.head_size,
            triton.next_power_of_2(shape.head_size),
            shape.budget,
            max(16, triton.next_power_of_2(shape.budget)),
            triton.cdiv(shape.budget, 16) * 16,
            2 * shape.num_kv_heads if shape.selector else 0,
        )
        found, self.num_multiprocessors = device_figures(pages.device)
        arch = arch or found
        tile = tile_for(DECODE, arch, shape.head_size, shape.dtype.itemsize, group)
        self.select_tile, self.decode_tile = dataclasses.replace(tile, rows=16), tile
        self.prefill_tile = tile
        if shape.dtype.itemsize < 4:  # float32 spills with more rows
            # 4 warps take fewer instructions a score, but spill on most of NVIDIA's chips. L4, L40S
            # and GeForce have room for two stages.
            eight = self.page.dims > 64 and arch.startswith("sm_") and arch != "sm_90"
            three = eight and arch in SHARED_MEMORY
            stages = tile.num_stages if three else min(2, tile.num_stages)
            self.prefill_tile = Tile(max(64, tile.rows), tile.keys, 8 if eight else 4, stages)
        self.scan_warps = pruned.scan_warps(self.page.slots, arch)
        given = {**functions(variant), "PAGE": self.page, "OWN": self.chunk}
        given |= {"PIECE": min(self.page.slots, 1024)}
        # A query sees as many keys as in a window.
        given["SHAPE"] = Shape(
            shape.num_kv_heads, group, shape.head_size, self.page.dims, shape.budget, shape.budget,
            0.0, False, False, 0, 0,
        )  # fmt: skip
        self.launch = {
            kernel: Launcher(kernel, constants(kernel, given))
            for kernel in (
                pruned.select_kernel, pruned.scan_kernel, pruned.attend_kernel,
                pruned.store_kernel, merge_kernel,
            )
        }  # fmt: skip

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch: Batch,
        out: Tensor,
        selecting: Tensor | None = None,
    ) -> None:
        if batch.halves:
            count = batch.num_decodes
            for half, tokens in zip(batch.halves, (slice(count), slice(count, None)), strict=True):
                given = None if selecting is None else selecting[tokens]
                self.step(query[tokens], key[tokens], value[tokens], half, out[tokens], given)
            return
        num_tokens, num_reqs = query.shape[0], batch.seq_lens.shape[0]
        if num_tokens == 0:
            return
        dtype, width, num_kv_heads = self.shape.dtype, self.page.width, self.page.num_kv_heads
        query = heads_together(query)
        key, value = heads_together(key.to(dtype)), heads_together(value.to(dtype))
        selectors, selecting_keys = query[:, 0], key[:, 0]
        if selecting is not None:
            selectors, selecting_keys = selecting[:, 0].to(query.dtype), selecting[:, 1].to(dtype)
        longest = min(num_tokens, batch.max_query_len or num_tokens)
        alone = longest == 1
        length = pruned.chunk_length(longest, num_tokens, num_reqs, width, self.chunk)
        rows = min(num_tokens, num_reqs * length)
        accumulators = scratch(query.device, "accumulators", rows, width + length)
        moves = scratch(query.device, "moves", rows, 2)
        deaths = scratch(query.device, "deaths", num_reqs, width)
        accumulators, moves, deaths = (
            each.view(torch.int32) for each in (accumulators, moves, deaths)
        )
        requests = batch.block_table, batch.query_start_loc, batch.seq_lens
        strides = self.pages.stride(0), batch.block_table.stride(0)
        select, attend = self.select_tile, self.decode_tile if alone else self.prefill_tile
        queries, splits, part_rows, part_outputs = attend.queries(self.page.group), 1, None, None
        if alone:
            queries, programs = 1, num_tokens * num_kv_heads
            splits = parts_for(DECODE, programs, self.num_multiprocessors, self.page.budget)
            splits = min(splits, max(1, self.page.slots // pruned.SLOTS_OF_PART))
        if splits > 1:
            of_parts = (num_tokens, self.num_heads, splits)
            part_rows = scratch(query.device, "part_rows", *of_parts, 2)
            part_outputs = scratch(query.device, "part_outputs", *of_parts, self.head_size)
        for first in range(0, longest, length):
            launch = {
                kernel: launcher.again if first else launcher
                for kernel, launcher in self.launch.items()
            }
            parts = triton.cdiv(width, select.keys)
            if not alone:
                parts += triton.cdiv(length, select.keys)
            launch[pruned.select_kernel](
                (rows // select.rows + num_reqs, parts),
                selectors, selecting_keys, self.pages, *requests, accumulators,
                self.scale, num_reqs, first, length,
                selectors.stride(0), selecting_keys.stride(0), *strides,
                options=select.options, ROWS=select.rows, KEYS=select.keys,
            )  # fmt: skip
            launch[pruned.scan_kernel](
                (num_reqs,),
                self.pages, *requests, accumulators, moves, deaths, first, length, *strides,
                options={"enable_fp_fusion": True, "num_warps": self.scan_warps},
            )  # fmt: skip
            tiles = rows if queries == 1 else rows // queries + num_reqs
            launch[pruned.attend_kernel](
                (tiles, num_kv_heads, splits),
                out, query, key, value, selecting_keys, self.pages, *requests, accumulators, moves,
                part_rows, part_outputs, self.scale, num_reqs, first, length,
                query.stride(0), key.stride(0), value.stride(0), selecting_keys.stride(0),
                out.stride(0), *strides, options=attend.options,
                ROWS=attend.rows, QUERIES=queries, KEYS=attend.keys, STORE=alone, SPLITS=splits,
            )  # fmt: skip
            if splits > 1:
                self.launch[merge_kernel](
                    (num_tokens, self.num_heads),
                    out, query, part_rows, part_outputs, *requests[1:], None, None, num_reqs,
                    query.stride(0), out.stride(0), options=FOUR_WARPS, SPLITS=splits,
                )  # fmt: skip
            if not alone:
                launch[pruned.store_kernel](
                    (rows, num_kv_heads),
                    key, value, selecting_keys, self.pages, *requests, moves,
                    num_reqs, first, length,
                    key.stride(0), value.stride(0), selecting_keys.stride(0), *strides,
                    options=ONE_WARP,
                )  # fmt: skip


@functools.cache
def device_figures(device: torch.device) -> tuple[str, int]:
    """Return architecture and number of multiprocessors: those of an H100 where the interpreter
    runs."""
    if device.type != "cuda":
        return "sm_90", 132
    properties = torch.cuda.get_device_properties(device)
    if torch.version.hip:
        return properties.gcnArchName.partition(":")[0], properties.multi_processor_count
    return f"sm_{properties.major}{properties.minor}", properties.multi_processor_count
