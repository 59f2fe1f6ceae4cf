"""Accumulators of stateful variants: what each token's was ahead of each tile of queries.

Tiles run side by side, so what queries before a tile have added to the accumulators must be known
before: here each program walks the queries for a tile of keys, with head 0 alone.
"""

import triton
import triton.language as tl

from attn_kernels.triton.attention import (
    Blocks,
    first_tile,
    load_blocks,
    load_keys,
    multiply,
    selections,
    visible,
)


@triton.jit
def select_kernel(
    query, cache, block_table, query_start_loc, seq_lens,
    snapshots,  # [tiles, keys] float32
    key_scale, scale,
    query_stride, block_stride, head_stride, table_stride, snapshot_stride,
    SELECTION: tl.constexpr, SHAPE: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Keep the accumulators ahead of each tile of QUERIES, and leave those after the last query
    in the cache. Grid: (num_reqs, tiles of keys)."""
    request = tl.program_id(0)
    key = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    start_loc = tl.load(query_start_loc + request)
    num_queries = tl.load(query_start_loc + request + 1) - start_loc
    seq_len = tl.load(seq_lens + request)
    first_position = seq_len - num_queries
    inside = key < seq_len
    if SHAPE.window:  # a block that nobody sees may be another request's by now
        inside &= key > first_position - SHAPE.window
    if (num_queries == 0) | (tl.max(inside.to(tl.int32), 0) == 0):
        return

    table = block_table + request.to(tl.int64) * table_stride
    blocks = Blocks(cache, table, block_stride, head_stride)
    block = load_blocks(blocks, key, inside, SHAPE)
    k = load_keys(blocks, block, 0, key, inside, query.dtype.element_ty, SHAPE)
    ends = cache + block * block_stride + 2 * SHAPE.block_size * SHAPE.head_size
    accumulators = ends.to(tl.pointer_type(tl.float32)) + key % SHAPE.block_size
    state = tl.load(accumulators, mask=inside, other=0.0)
    if SHAPE.quantized:
        scale *= tl.load(key_scale)

    row, dim = tl.arange(0, ROWS), tl.arange(0, SHAPE.dims)
    tile = first_tile(start_loc, request, QUERIES).to(tl.int64)
    for first in range(0, num_queries, QUERIES):
        tl.store(snapshots + tile * snapshot_stride + key, state, mask=inside)
        tile += 1
        index = first + row
        valid = (row < QUERIES) & (index < num_queries)
        token = (start_loc + index).to(tl.int64)
        mask = valid[:, None] & (dim < SHAPE.head_size)[None, :]
        q = tl.load(query + token[:, None] * query_stride + dim[None, :], mask=mask, other=0.0)
        x = multiply(q, k, tl.zeros([ROWS, KEYS], tl.float32)) * scale
        position = first_position + index
        seen = visible(position, key, SHAPE.window) & inside[None, :] & valid[:, None]
        state += tl.sum(selections(x, seen, position, key, SELECTION), 0)
    tl.store(accumulators, state, mask=inside)
