"""A stateful variant's accumulators over whole sequences, and their derivatives, for training.

Tiles of queries run side by side in `dense.py` and `backward.py`: they find here what queries
before them have added. What a selection costs later queries is summed up here, too, from the last
query to the first.
"""

import triton
import triton.language as tl

from attn_kernels.triton.backward import differentiate, load_rows
from attn_kernels.triton.cache import multiply
from attn_kernels.triton.dense import (
    SIZES,
    Strides,
    Tile,
    keys_of,
    load_tile,
    selected,
    selector_of,
    store_tile,
)


@triton.jit
def rows_of(rows, plane, index, num_tokens):
    """Return a `Tile` of which only the intervals are known."""
    inside = index < num_tokens
    begin = tl.load(rows + index, mask=inside, other=0)
    end = tl.load(rows + plane + index, mask=inside, other=0)
    return Tile(index, index, begin, end, inside, index, index, index, index, plane)


@triton.jit(do_not_specialize=SIZES)
def snapshots_kernel(
    snapshots, query, key, rows, scale, batch_size, num_tokens,
    q_batch, q_token, k_batch, k_token,
    SELECTION: tl.constexpr, SHAPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Store the accumulators ahead of each tile of queries that can see a tile of keys. Grid:
    (batch, tiles of keys)."""
    batch, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE.keys
    plane = batch_size * num_tokens
    rows += batch * num_tokens
    selector = selector_of(
        query, key, rows, snapshots, batch, num_tokens, plane,
        Strides(q_batch, 0, q_token), Strides(k_batch, 0, k_token), TILE.rows,
    )  # fmt: skip
    at = first + tl.arange(0, TILE.keys)
    state = tl.full([TILE.keys], 0.0, tl.float32)
    for start in range(first // TILE.rows * TILE.rows, num_tokens, TILE.rows):
        place = selector.snapshots + tl.cast(start // TILE.rows, tl.int64) * num_tokens + at
        tl.store(place, state, mask=at < num_tokens)
        tile = rows_of(rows, plane, start + tl.arange(0, TILE.rows), num_tokens)
        x, chosen = selected(tile, selector, at, scale, num_tokens, SHAPE, TILE.rows, TILE.keys)
        state += tl.sum(tl.where(chosen, SELECTION(x), 0.0), 0)


@triton.jit(do_not_specialize=SIZES)
def selections_kernel(
    d_query,  # [batch, num_tokens, head_size] float32, 0: what head 0's queries get in addition
    d_key,  # [batch, num_tokens, head_size] float32: what KV head 0's keys do
    row_values, d_out, query, key, value, rows, units, snapshots, decays, statistics,
    first_learned, second_learned, scale, batch_size, num_tokens,
    do_batch, do_head, do_token, q_batch, q_head, q_token, k_batch, k_head, k_token,
    v_batch, v_head, v_token,
    SCORE_BIAS: tl.constexpr, SELECTION: tl.constexpr, WEIGHTS_BACKWARD: tl.constexpr,
    SELECTION_BACKWARD: tl.constexpr, PARAMS: tl.constexpr, VARIANT: tl.constexpr,
    SHAPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of head 0's queries and keys through the accumulators. Grid: (batch,
    tiles of keys)."""
    batch, first = tl.program_id(0).to(tl.int64), tl.program_id(1) * TILE.keys
    plane = batch_size * num_tokens
    wide_plane = plane.to(tl.int64) * SHAPE.num_heads
    rows += batch * num_tokens
    k_strides, v_strides = Strides(k_batch, k_head, k_token), Strides(v_batch, v_head, v_token)
    selector = selector_of(
        query, key, rows, snapshots, batch, num_tokens, plane,
        Strides(q_batch, q_head, q_token), k_strides, TILE.rows,
    )  # fmt: skip
    at = first + tl.arange(0, TILE.keys)
    later = tl.full([TILE.keys], 0.0, tl.float32)  # the scores' derivatives, of queries behind
    dk = tl.full([TILE.keys, SHAPE.dims], 0.0, tl.float32)
    low = first // TILE.rows
    tiles = tl.cdiv(num_tokens, TILE.rows) - low
    dim = tl.arange(0, SHAPE.dims)
    for step in range(0, tiles):
        index = (low + tiles - 1 - step) * TILE.rows + tl.arange(0, TILE.rows)
        d = tl.full([TILE.rows, TILE.keys], 0.0, tl.float32)
        for head in range(0, SHAPE.num_heads):
            wide = batch * 0 + head
            q_start = query + batch * q_batch + wide * q_head
            q = load_tile(q_start, index, q_token, num_tokens, SHAPE, True)
            do_start = d_out + batch * do_batch + wide * do_head
            do = load_tile(do_start, index, do_token, num_tokens, SHAPE, True)
            row_start = (batch * SHAPE.num_heads + wide) * num_tokens
            tile, known, saved = load_rows(
                q, index, row_values, statistics, rows, plane, row_start, wide_plane, head,
                num_tokens, first_learned, second_learned, decays, None, VARIANT,
            )  # fmt: skip
            keys = keys_of(
                key, value, units, batch, wide // SHAPE.group, num_tokens, k_strides, v_strides,
                SHAPE,
            )  # fmt: skip
            k = load_tile(keys.k, at, keys.k_stride, num_tokens, SHAPE, True)
            v = load_tile(keys.v, at, keys.v_stride, num_tokens, SHAPE, True)
            _, ds = differentiate(
                tile, known, k, v, do, keys, selector, at, saved, scale, num_tokens, SCORE_BIAS,
                SELECTION, WEIGHTS_BACKWARD, PARAMS, VARIANT, SHAPE, TILE, False, True,
            )  # fmt: skip
            d += ds
        tile = rows_of(rows, plane, index, num_tokens)
        x, chosen = selected(tile, selector, at, scale, num_tokens, SHAPE, TILE.rows, TILE.keys)
        total = tl.sum(d, 0)
        behind = later[None, :] + total[None, :] - tl.cumsum(d, 0)
        dx = tl.where(chosen, -behind * SELECTION_BACKWARD(x), 0.0) * scale
        later += total
        q = load_tile(selector.q, index, selector.q_stride, num_tokens, SHAPE, True)
        k = load_tile(selector.k, at, selector.k_stride, num_tokens, SHAPE, True)
        dk = multiply(tl.trans(dx.to(q.dtype)), q, dk)
        dq = multiply(dx.to(k.dtype), k, tl.full([TILE.rows, SHAPE.dims], 0.0, tl.float32))
        place = d_query + (batch * num_tokens + index)[:, None] * SHAPE.head_size + dim[None, :]
        mask = tile.inside[:, None] & (dim < SHAPE.head_size)[None, :]
        tl.atomic_add(place, dq, mask=mask, sem="relaxed")
    start = d_key + batch * num_tokens * SHAPE.head_size
    store_tile(start, at, SHAPE.head_size, num_tokens, dk, SHAPE)
