"""Accumulators of a stateful variant: what head 0's queries add to them.

Those ahead of each tile of queries come from `select_kernel` and `advance_kernel`; what the tile's
own queries add is summed up where they attend (`selected`, `add_before`). SHAPE and TILE are those
of `tiles`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attn_kernels.triton.cache import (
    Blocks,
    find_parameters,
    find_state,
    load_blocks,
    load_keys,
    multiply,
    score_keys,
)
from attn_kernels.triton.kv_quant import rotate
from attn_kernels.triton.tiles import SIZES, STEP, find_request, first_tile, visible


class Selectors(NamedTuple):
    """Head 0's queries of a tile, of a stateful variant: `q` `[N, dims]`, N a power of two of 16
    at least; the other two `[N]`."""

    q: Any
    position: Any
    valid: Any
    before: Any
    """`[rows, N]`: 1 where a selector is before the row's query, else 0."""


@triton.jit
def selected(
    selectors, k, words, key, inside, scale,
    SELECTION: tl.constexpr, SHAPE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return what head 0's queries add to the accumulators of keys, `[N, keys]`: nothing to their
    own token's and nothing to the first's."""
    zeros = tl.full([selectors.q.shape[0], k.shape[1]], 0.0, tl.float32)
    added = SELECTION(score_keys(selectors.q, k, words, inside, zeros, SHAPE) * scale)
    chosen = (key != 0)[None, :]
    if MASKED:
        chosen = chosen & inside[None, :] & selectors.valid[:, None]
        chosen = chosen & (key[None, :] != selectors.position[:, None])
        chosen = chosen & visible(selectors.position, key, SHAPE.window)
    return tl.where(chosen, added, 0.0)


@triton.jit
def add_before(selectors, added, output):
    """Return `output` `[rows, keys]` and, for each row, the sum of what the selectors before it
    have added."""
    if selectors.q.dtype == tl.float32:
        return multiply(selectors.before, added, output)
    # A product of two halves of a float32 keeps 16 bits, by which it is as exact as the scores.
    high = added.to(tl.bfloat16)
    low = (added - high.to(tl.float32)).to(tl.bfloat16)
    before = selectors.before.to(tl.bfloat16)
    return multiply(before, low, multiply(before, high, output))


@triton.jit
def load_selectors(
    selectors, stride, start_loc, first, num_queries, first_position, query_of_row,
    SHAPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Return the `Selectors` of a tile whose first query is a request's `first`; `query_of_row`
    `[rows]` says which of the tile a row's is."""
    query, dim = tl.arange(0, TILE.selectors), tl.arange(0, SHAPE.dims)
    index = first + query
    valid = (query < TILE.queries) & (index < num_queries)
    place = selectors + (start_loc + index).to(tl.int64)[:, None] * stride + dim[None, :]
    q = tl.load(place, mask=valid[:, None] & (dim < SHAPE.head_size)[None, :], other=0.0)
    if SHAPE.kv_bits == 4:
        q = rotate(q, TILE.selectors, SHAPE.dims, SHAPE.head_size)
    before = (query[None, :] < query_of_row[:, None]).to(tl.float32)
    return Selectors(q, first_position + index, valid, before)


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=STEP)
def select_kernel(
    selectors, cache, block_table, query_start_loc, seq_lens,
    snapshots,  # [tiles, keys] float32
    key_scale, scale, num_reqs,
    selector_stride, block_stride, head_stride, table_stride, snapshot_stride,
    SELECTION: tl.constexpr, SHAPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Sum up what each tile of queries adds to the accumulators: for `advance_kernel`, or, where
    each request has one query only, in the cache at once. Grid: (tiles, programs that share a
    tile's keys)."""
    tile = tl.program_id(0)
    request = find_request(query_start_loc, tile, num_reqs, TILE.queries)
    start_loc = tl.load(query_start_loc + request)
    num_queries = tl.load(query_start_loc + request + 1) - start_loc
    first = (tile - first_tile(start_loc, request, TILE.queries)) * TILE.queries
    if first >= num_queries:
        return
    first_position = tl.load(seq_lens + request) - num_queries
    end = first_position + tl.minimum(first + TILE.queries, num_queries)  # of the keys it sees
    begin = tl.program_id(1) * TILE.keys
    if SHAPE.window:  # a block that nobody sees may be another request's by now
        oldest = tl.maximum(first_position + first - SHAPE.window + 1, 0)
        begin += oldest // TILE.keys * TILE.keys
    table = block_table + request.to(tl.int64) * table_stride
    blocks = Blocks(cache, table, block_stride, head_stride)
    selecting = load_selectors(
        selectors, selector_stride, start_loc, first, num_queries, first_position,
        tl.arange(0, TILE.rows), SHAPE, TILE,
    )  # fmt: skip
    if SHAPE.quantized:
        scale *= tl.load(key_scale)
    for start in range(begin, end, tl.num_programs(1) * TILE.keys):
        key = start + tl.arange(0, TILE.keys)
        inside = key < end
        if SHAPE.window:
            inside &= key >= oldest
        block, offset = load_blocks(blocks, key, inside, SHAPE), key % SHAPE.block_size
        k = load_keys(blocks, block, SHAPE.selecting_head, offset, inside, selecting.q.dtype, SHAPE)
        words = find_parameters(blocks, block, SHAPE.selecting_head, offset, False, SHAPE)
        added = selected(selecting, k, words, key, inside, scale, SELECTION, SHAPE, True)
        total = tl.sum(added, 0)
        if TILE.decode:
            accumulators = find_state(blocks, block, 0, SHAPE) + offset
            state = tl.load(accumulators, mask=inside, other=0.0)
            tl.store(accumulators, state + total, mask=inside)
        else:
            tl.store(snapshots + tile.to(tl.int64) * snapshot_stride + key, total)


@triton.jit(do_not_specialize=SIZES[1:], do_not_specialize_on_alignment=STEP)
def advance_kernel(
    cache, block_table, query_start_loc, seq_lens,
    snapshots,  # [tiles, keys] float32: what each tile adds; then the accumulators ahead of it
    block_stride, head_stride, table_stride, snapshot_stride,
    SHAPE: tl.constexpr, QUERIES: tl.constexpr, TILES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Add up what the tiles before each tile of QUERIES have added to the accumulators, and leave
    in the cache what is after the last one. Grid: (num_reqs, tiles of keys)."""
    request = tl.program_id(0)
    key = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    start_loc = tl.load(query_start_loc + request)
    num_queries = tl.load(query_start_loc + request + 1) - start_loc
    seq_len = tl.load(seq_lens + request)
    first_position = seq_len - num_queries
    inside = key < seq_len
    if SHAPE.window:
        inside &= key > first_position - SHAPE.window
    if (num_queries == 0) | (tl.max(inside.to(tl.int32), 0) == 0):
        return
    table = block_table + request.to(tl.int64) * table_stride
    blocks = Blocks(cache, table, block_stride, head_stride)
    block = load_blocks(blocks, key, inside, SHAPE)
    accumulators = find_state(blocks, block, 0, SHAPE) + key % SHAPE.block_size
    state = tl.load(accumulators, mask=inside, other=0.0)
    tiles = tl.cdiv(num_queries, QUERIES)
    snapshots += first_tile(start_loc, request, QUERIES).to(tl.int64) * snapshot_stride
    for start in range(0, tiles, TILES):
        tile = start + tl.arange(0, TILES)
        end = first_position + tl.minimum((tile + 1) * QUERIES, num_queries)
        seen = (tile < tiles)[:, None] & inside[None, :] & (key[None, :] < end[:, None])
        if SHAPE.window:
            oldest = first_position + tile * QUERIES
            seen &= key[None, :] > (oldest - SHAPE.window)[:, None]
        place = snapshots + tile.to(tl.int64)[:, None] * snapshot_stride + key[None, :]
        added = tl.load(place, mask=seen, other=0.0)
        before = state[None, :] + (tl.cumsum(added, 0) - added)
        tl.store(place, before, mask=(tile < tiles)[:, None] & inside[None, :])
        state += tl.sum(added, 0)
    tl.store(accumulators, state, mask=inside)
