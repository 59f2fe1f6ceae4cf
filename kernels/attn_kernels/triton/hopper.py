"""Prefill on NVIDIA's Hopper, written in Gluon: what `attention.attend_kernel` does, by a warp that
copies and warps that compute.

One warp (`produce`) goes along the blocks of a tile's keys and lets the chip's copy engine (TMA)
bring keys and values into rings of `num_stages` tiles in shared memory. The others (`consume`)
multiply: the scores of a tile are under way before the values of the tile ahead are added, so that
tensor cores have work while weights are computed. Each place of a ring has two barriers: it is
filled, it is free again.

A variant's functions are those that Triton's kernel calls; they may not use `tl.zeros`,
`tl.zeros_like` and `tl.full`, which Gluon wants a layout of. What else a layer must be, `takes`
says. A tile asks for this kernel (`tuning.Tile.kernel`).

It is compiled ahead of time (`benchmarks.triton_compile`), and its source is right in an emulator
(tests/attn_kernels/gluon_emulator.py); it has never run on a GPU. Therefore no layer uses it but
where a table says so that `attnserve tune` wrote: after its outputs were compared with the
reference there, and it was faster.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from attn_kernels.triton.attention import known_of
from attn_kernels.triton.launch import Launcher
from attn_kernels.triton.tiles import SIZES, STEP, Shape, Tiling, find_request, first_tile
from attn_kernels.triton.variant import constants, is_plain

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from attn_kernels.batch import Batch
    from attn_kernels.triton.tuning import Tile

PRODUCER_REGISTERS = gl.constexpr(24)
"""Of a thread of the warp that copies; the others share the rest."""

SWIZZLED = gl.constexpr(gl.NVMMASharedLayout(128, 16, 2))
"""How tensor cores and the copy engine expect a tile in shared memory."""

copy_tile = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared
"""Its name depends on Triton's version."""


@gluon.jit
def rows_of(row, token, count, position, kv_head, SHAPE: gl.constexpr, TILE: gl.constexpr):
    """Return of rows of a tile, whose first query is `token` at `position`, and whose request has
    `count` queries from there on: whether there is a query, its token, position and head."""
    query = row // SHAPE.group
    valid = (row < TILE.queries * SHAPE.group) & (query < count)
    return valid, token + query, position + query, kv_head * SHAPE.group + row % SHAPE.group


@gluon.constexpr_function
def row_layout(lanes, rows):
    """Return a layout of vectors `[n, dims]` for the warps of a tile of `rows`, where `lanes`
    threads share a vector, 16 bytes each."""
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [rows // 16, 1], [1, 0])


@gluon.jit
def places_of(
    vectors, stride, token, count, kv_head,
    SHAPE: gl.constexpr, TILE: gl.constexpr, LANES: gl.constexpr,
):  # fmt: skip
    """Return where a tile's queries, or outputs, are, `[rows, dims]`, and whether they are."""
    dims: gl.constexpr = SHAPE.head_size
    layout: gl.constexpr = row_layout(LANES, TILE.rows)
    row = gl.arange(0, TILE.rows, gl.SliceLayout(1, layout))
    valid, token, _, head = rows_of(row, token, count, 0, kv_head, SHAPE, TILE)
    row = vectors + token.to(gl.int64) * stride + head * dims
    dim = gl.arange(0, dims, gl.SliceLayout(0, layout))
    return row[:, None] + dim[None, :], valid[:, None]


@gluon.jit
def part_of(token, head, split, SHAPE: gl.constexpr, TILE: gl.constexpr):
    """Return the number of a row's part of its context."""
    num_heads: gl.constexpr = SHAPE.num_kv_heads * SHAPE.group
    return (token.to(gl.int64) * num_heads + head) * TILE.splits + split


@gluon.jit
def copy_keys(
    pages, table, ring, filled, free, stage, phase, start, end, block_rows, first_row,
    SHAPE: gl.constexpr, TILE: gl.constexpr,
):  # fmt: skip
    """Bring the keys, or values, from `start` to a place of a ring as soon as it is free. In place
    of blocks from `end` on, which may not be there, comes block 0."""
    box: gl.constexpr = min(TILE.keys, SHAPE.block_size)
    filled, place = filled.index(stage), ring.index(stage)
    mbarrier.wait(free.index(stage), phase ^ 1)
    mbarrier.expect(filled, TILE.keys * SHAPE.head_size * 2)
    for part in gl.static_range(TILE.keys // box):
        key = start + part * box
        block = gl.load(table + key // SHAPE.block_size, mask=key < end, other=0)
        row = block * block_rows + first_row + key % SHAPE.block_size
        copy_tile(pages, [row, 0], filled, place.slice(part * box, box))


@gluon.jit
def produce(
    pages, table, keys, values, keys_filled, keys_free, values_filled, values_free,
    begin, end, tiles, block_rows, head_row,
    SHAPE: gl.constexpr, TILE: gl.constexpr, STAGES: gl.constexpr,
):  # fmt: skip
    """Copy `tiles` tiles of keys and values."""
    for i in range(tiles):
        stage, phase = i % STAGES, i // STAGES & 1
        start = begin + i * TILE.keys
        copy_keys(
            pages, table, keys, keys_filled, keys_free, stage, phase, start, end,
            block_rows, head_row, SHAPE, TILE,
        )  # fmt: skip
        copy_keys(
            pages, table, values, values_filled, values_free, stage, phase, start, end,
            block_rows, head_row + SHAPE.block_size, SHAPE, TILE,
        )  # fmt: skip


@gluon.jit
def consume(
    out, q, keys, values, keys_filled, keys_free, values_filled, values_free,
    first_learned, second_learned, part_rows, part_outputs,
    scale, out_stride, begin, end, tiles, split, token, count, position, kv_head,
    QUERY_FACTOR: gl.constexpr, UPDATE: gl.constexpr, EPILOGUE: gl.constexpr,
    PARAMS: gl.constexpr, VARIANT: gl.constexpr, SHAPE: gl.constexpr, TILE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Attend with the queries `q` in shared memory to `tiles` tiles of keys, and store the
    outputs."""
    dims: gl.constexpr = SHAPE.head_size
    warps: gl.constexpr = TILE.rows // 16
    of_scores: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, TILE.keys, 16])
    of_output: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [warps, 1], [16, dims, 16])
    of_weights: gl.constexpr = gl.DotOperandLayout(0, of_output, 2)
    of_rows: gl.constexpr = gl.SliceLayout(1, of_scores)
    of_output_rows: gl.constexpr = gl.SliceLayout(1, of_output)

    row = gl.arange(0, TILE.rows, of_rows)
    valid, tokens, positions, head = rows_of(row, token, count, position, kv_head, SHAPE, TILE)
    known = known_of(
        positions, head, q.load(of_scores), valid, first_learned, second_learned, VARIANT, SHAPE
    )
    factor = QUERY_FACTOR(known, scale, dims, PARAMS)
    zeros = gl.full([TILE.rows, TILE.keys], 0.0, gl.float32, of_scores)
    nothing = gl.full([TILE.rows], 0.0, gl.float32, of_rows)
    running_max, denominator = nothing + VARIANT.first_max, nothing
    offset = gl.arange(0, TILE.keys, gl.SliceLayout(0, of_scores))

    mbarrier.wait(keys_filled.index(0), 0)
    s = warpgroup_mma(q, keys.index(0).permute((1, 0)), zeros, use_acc=False, is_async=True)
    s = warpgroup_mma_wait(0, deps=[s])
    mbarrier.arrive(keys_free.index(0))
    output = warpgroup_mma_init(gl.full([TILE.rows, dims], 0.0, gl.float32, of_output))
    # All rows see all keys of the tiles up to `full`, which end before the first query's own; the
    # last tile comes behind the loops.
    full = gl.maximum(gl.minimum(position + 1, end) - begin, 0) // TILE.keys
    full = gl.minimum(full, tiles - 1)
    for masked in gl.static_range(2):
        start_of, end_of = (full, tiles - 1) if masked else (0, full)
        for i in range(start_of, end_of):
            s *= factor[:, None]
            seen = gl.full([TILE.rows, TILE.keys], True, gl.int1, of_scores)
            if masked:
                seen = (positions - (begin + i * TILE.keys))[:, None] >= offset[None, :]
                s = gl.where(seen, s, 0.0)
            weights, rescale, running_max, denominator = UPDATE(
                s, seen, running_max, denominator, nothing, nothing, known, PARAMS
            )
            output = warpgroup_mma_wait(0, deps=[output])
            mbarrier.arrive(values_free.index((i + STAGES - 1) % STAGES), pred=i > 0)
            output *= gl.convert_layout(rescale, of_output_rows)[:, None]
            p = gl.convert_layout(weights.to(q.dtype), of_weights)
            stage, after = i % STAGES, (i + 1) % STAGES
            mbarrier.wait(keys_filled.index(after), (i + 1) // STAGES & 1)
            k = keys.index(after).permute((1, 0))
            s = warpgroup_mma(q, k, zeros, use_acc=False, is_async=True)
            mbarrier.wait(values_filled.index(stage), i // STAGES & 1)
            output = warpgroup_mma(p, values.index(stage), output, is_async=True)
            s = warpgroup_mma_wait(1, deps=[s])
            mbarrier.arrive(keys_free.index(after))

    # No query sees a key from `end` on, which may be NaN. Rows without a query may: nothing of them
    # is stored.
    start = begin + (tiles - 1) * TILE.keys
    seen = (positions - start)[:, None] >= offset[None, :]
    s = gl.where(seen, s * factor[:, None], 0.0)
    weights, rescale, running_max, denominator = UPDATE(
        s, seen, running_max, denominator, nothing, nothing, known, PARAMS
    )
    output = warpgroup_mma_wait(0, deps=[output])
    output *= gl.convert_layout(rescale, of_output_rows)[:, None]
    p = gl.convert_layout(weights.to(q.dtype), of_weights)
    stage = (tiles - 1) % STAGES
    mbarrier.wait(values_filled.index(stage), (tiles - 1) // STAGES & 1)
    v = values.index(stage)
    if start + TILE.keys > end:
        # A value behind the last may be NaN, which a weight of 0 does not make 0.
        of_values: gl.constexpr = row_layout(dims // 8, TILE.rows)
        inside = start + gl.arange(0, TILE.keys, gl.SliceLayout(1, of_values)) < end
        there = v.load(of_values)
        v.store(gl.where(inside[:, None], there, gl.zeros_like(there)))
        fence_async_shared()
    output = warpgroup_mma(p, v, output, is_async=True)
    output = warpgroup_mma_wait(0, deps=[output])

    if TILE.splits > 1:
        part = part_of(tokens, head, split, SHAPE, TILE)
        gl.store(part_rows + 2 * part, running_max, mask=valid)
        gl.store(part_rows + 2 * part + 1, denominator, mask=valid)
        row = gl.arange(0, TILE.rows, of_output_rows)
        valid, tokens, _, head = rows_of(row, token, count, position, kv_head, SHAPE, TILE)
        part = part_of(tokens, head, split, SHAPE, TILE)
        dim = gl.arange(0, dims, gl.SliceLayout(0, of_output))
        place = part_outputs + part[:, None] * dims + dim[None, :]
        gl.store(place, output, mask=valid[:, None])
    else:
        last_factor = EPILOGUE(running_max, denominator, known, PARAMS)
        output *= gl.convert_layout(last_factor, of_output_rows)[:, None]
        q.store(output.to(q.dtype))  # no query is needed any more; whole rows are stored faster
        place, valid = places_of(out, out_stride, token, count, kv_head, SHAPE, TILE, 4)
        rounded = q.load(row_layout(4, TILE.rows))
        gl.store(place, rounded.to(out.dtype.element_ty), mask=valid)


@gluon.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=STEP)
def prefill_kernel(
    out, query,
    pages,  # [rows, head_size]: a descriptor of the cache, a row for each key and each value
    block_table, query_start_loc, seq_lens,
    first_learned, second_learned,  # [num_heads] float32
    part_rows,  # [num_tokens, num_heads, splits, 2] float32
    part_outputs,  # [num_tokens, num_heads, splits, head_size] float32
    scale, num_reqs, query_stride, out_stride, block_rows, head_rows, table_stride,
    QUERY_FACTOR: gl.constexpr, UPDATE: gl.constexpr, EPILOGUE: gl.constexpr,
    PARAMS: gl.constexpr, VARIANT: gl.constexpr, SHAPE: gl.constexpr, TILE: gl.constexpr,
    STAGES: gl.constexpr,
):  # fmt: skip
    """Attend with one tile's queries. Grid: (tiles * num_kv_heads, splits), as of
    `attention.attend_kernel`."""
    program, split = gl.program_id(0), gl.program_id(1)
    kv_head = program % SHAPE.num_kv_heads
    tile = (gl.num_programs(0) - 1 - program) // SHAPE.num_kv_heads
    request = find_request(query_start_loc, tile, num_reqs, TILE.queries)
    start_loc = gl.load(query_start_loc + request).to(gl.int32)
    num_queries = gl.load(query_start_loc + request + 1).to(gl.int32) - start_loc
    first = (tile - first_tile(start_loc, request, TILE.queries)) * TILE.queries
    if first >= num_queries:
        return
    token, count = start_loc + first, num_queries - first
    position = gl.load(seq_lens + request).to(gl.int32) - count
    begin, end = 0, position + gl.minimum(count, TILE.queries)
    if TILE.splits > 1:
        keys_each = tl.cdiv(tl.cdiv(end, TILE.keys), TILE.splits) * TILE.keys
        begin = split * keys_each
        end = gl.maximum(gl.minimum(end, begin + keys_each), begin)
    tiles = gl.maximum(tl.cdiv(end - begin, TILE.keys), 1)  # a part without keys has one, too

    dtype: gl.constexpr = query.dtype.element_ty
    dims: gl.constexpr = SHAPE.head_size
    place, valid = places_of(query, query_stride, token, count, kv_head, SHAPE, TILE, dims // 8)
    q = gl.allocate_shared_memory(dtype, [TILE.rows, dims], SWIZZLED)
    q.store(gl.load(place, mask=valid, other=0.0))
    keys = gl.allocate_shared_memory(dtype, [STAGES, TILE.keys, dims], SWIZZLED)
    values = gl.allocate_shared_memory(dtype, [STAGES, TILE.keys, dims], SWIZZLED)
    one: gl.constexpr = mbarrier.MBarrierLayout()
    keys_filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    values_filled = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], one)
    for i in gl.static_range(STAGES):
        mbarrier.init(keys_filled.index(i), count=1)
        mbarrier.init(keys_free.index(i), count=1)
        mbarrier.init(values_filled.index(i), count=1)
        mbarrier.init(values_free.index(i), count=1)
    fence_async_shared()  # products and copies see what was written until here
    table = block_table + request.to(gl.int64) * table_stride
    gl.warp_specialize(
        [
            (
                consume,
                (
                    out, q, keys, values, keys_filled, keys_free, values_filled, values_free,
                    first_learned, second_learned, part_rows, part_outputs, scale, out_stride,
                    begin, end, tiles, split, token, count, position, kv_head,
                    QUERY_FACTOR, UPDATE, EPILOGUE, PARAMS, VARIANT, SHAPE, TILE, STAGES,
                ),
            ),
            (
                produce,
                (
                    pages, table, keys, values, keys_filled, keys_free, values_filled, values_free,
                    begin, end, tiles, block_rows, kv_head * head_rows, SHAPE, TILE, STAGES,
                ),
            ),
        ],
        [1],
        [PRODUCER_REGISTERS],
    )  # fmt: skip


def takes(given: Mapping[str, Any], shape: Shape, kv_cache: Tensor) -> bool:
    """Return whether the kernel does what a layer needs, of a kernel's kind that it is for
    (`tuned.for_gluon`).

    Args:
        given: what the variant gives to kernels (`variant.functions`).
        shape: the layer's.
        kv_cache: the layer's, whose rows are the copy engine's.
    """
    modified = shape.window or shape.soft_cap or shape.alibi
    whole_rows = all(stride % shape.head_size == 0 for stride in kv_cache.stride()[:2])
    numbered = 0 < kv_cache.shape[0] * kv_cache.stride(0) // shape.head_size < 2**31
    aligned = kv_cache.data_ptr() % 16 == 0
    return is_plain(given) and not modified and whole_rows and numbered and aligned


class Prefill:
    """The kernel bound to one layer's cache.

    Args:
        given: what the variant gives to kernels, and SHAPE.
        kv_cache: a cache that `takes` takes, in the queries' dtype.
    """

    def __init__(self, given: Mapping[str, Any], kv_cache: Tensor) -> None:
        self.launch = Launcher(prefill_kernel, constants(prefill_kernel, given))
        self.kv_cache, self.shape = kv_cache, given["SHAPE"]
        self.rows = [stride // self.shape.head_size for stride in kv_cache.stride()[:2]]
        self.pages: dict[int, TensorDescriptor] = {}

    def descriptor(self, keys: int) -> TensorDescriptor:
        """Return the cache as rows `[rows, head_size]` from which a copy takes what a tile of
        `keys` keys has in one block. A launch takes it apart: a CUDA graph keeps the address."""
        size, box = self.shape.head_size, min(keys, self.shape.block_size)
        if box not in self.pages:
            lasts = zip(self.kv_cache.shape, self.rows, strict=False)
            rows = sum((count - 1) * each for count, each in lasts) + 2 * self.shape.block_size
            self.pages[box] = TensorDescriptor(
                self.kv_cache, [rows, size], [size, 1], [box, size], SWIZZLED.value
            )
        return self.pages[box]

    def __call__(
        self,
        grid: tuple[int, int],
        out: Tensor,
        query: Tensor,
        batch: Batch,
        learned: tuple[Tensor | None, Tensor | None],
        parts: tuple[Tensor | None, Tensor | None],
        scale: float,
        tile: Tile,
        cut: Tiling,
    ) -> None:
        """Launch it; arguments as `attention.attend_kernel`'s."""
        self.launch(
            grid,
            out, query, self.descriptor(tile.keys), batch.block_table, batch.query_start_loc,
            batch.seq_lens, *learned, *parts, scale, batch.seq_lens.shape[0],
            query.stride(0), out.stride(0), *self.rows, batch.block_table.stride(0),
            options=tile.options, TILE=cut, STAGES=tile.num_stages,
        )  # fmt: skip
