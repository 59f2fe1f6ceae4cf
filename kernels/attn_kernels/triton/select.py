"""Accumulators of stateful variants: what each token's was ahead of each tile of queries.

Tiles run side by side, so what queries before a tile have added to the accumulators must be known
before: here each program walks the queries for a tile of keys, with head 0 alone.
"""

import triton
import triton.language as tl

from attn_kernels.triton.attention import (
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
    QUANTIZED: tl.constexpr, WINDOW: tl.constexpr,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIMS: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Keeps the accumulators ahead of each tile of QUERIES, and leaves those after the last query
    in the cache. Grid: (num_reqs, tiles of keys)."""
    request = tl.program_id(0)
    key = tl.program_id(1) * KEYS + tl.arange(0, KEYS)
    start_loc = tl.load(query_start_loc + request)
    num_queries = tl.load(query_start_loc + request + 1) - start_loc
    seq_len = tl.load(seq_lens + request)
    first_position = seq_len - num_queries
    inside = key < seq_len
    if WINDOW:  # a block that nobody sees may be another request's by now
        inside &= key > first_position - WINDOW
    if (num_queries == 0) | (tl.max(inside.to(tl.int32), 0) == 0):
        return

    block = load_blocks(block_table, request, table_stride, key, inside, BLOCK_SIZE)
    k = load_keys(
        cache, block, 0, key, inside, block_stride, head_stride, query.dtype.element_ty,
        BLOCK_SIZE, HEAD_SIZE, DIMS,
    )  # fmt: skip
    ends = cache + block * block_stride + 2 * BLOCK_SIZE * HEAD_SIZE
    accumulators = ends.to(tl.pointer_type(tl.float32)) + key % BLOCK_SIZE
    state = tl.load(accumulators, mask=inside, other=0.0)
    if QUANTIZED:
        scale *= tl.load(key_scale)

    row, dim = tl.arange(0, ROWS), tl.arange(0, DIMS)
    tile = first_tile(start_loc, request, QUERIES).to(tl.int64)
    for first in range(0, num_queries, QUERIES):
        tl.store(snapshots + tile * snapshot_stride + key, state, mask=inside)
        tile += 1
        index = first + row
        valid = (row < QUERIES) & (index < num_queries)
        token = (start_loc + index).to(tl.int64)
        mask = valid[:, None] & (dim < HEAD_SIZE)[None, :]
        q = tl.load(query + token[:, None] * query_stride + dim[None, :], mask=mask, other=0.0)
        x = multiply(q, k, tl.zeros([ROWS, KEYS], tl.float32)) * scale
        position = first_position + index
        seen = visible(position, key, WINDOW) & inside[None, :] & valid[:, None]
        state += tl.sum(selections(x, seen, position, key), 0)
    tl.store(accumulators, state, mask=inside)
