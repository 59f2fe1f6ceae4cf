"""The forward of `dense.py`'s attention."""

import triton
import triton.language as tl

from attn_kernels.triton.cache import multiply
from attn_kernels.triton.dense import (
    SIZES,
    Strides,
    describe,
    edge,
    edges,
    keys_of,
    load_tile,
    scores_of,
    seen_by,
    seen_keys,
    selector_of,
    store_tile,
)


@triton.jit
def attend_tile(
    tile, known, keys, selector, start, scale, num_tokens, running_max, denominator, output,
    mean, per_spread,
    UPDATE: tl.constexpr, SCORE_BIAS: tl.constexpr, UPDATE_STATISTICS: tl.constexpr,
    SELECTION: tl.constexpr, PARAMS: tl.constexpr, VARIANT: tl.constexpr, SHAPE: tl.constexpr,
    TILE: tl.constexpr, STATISTICS_ONLY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take up one tile of keys: into the statistics, or into the output."""
    key = start + tl.arange(0, TILE.keys)
    k = load_tile(keys.k, key, keys.k_stride, num_tokens, SHAPE, MASKED)
    s = scores_of(
        tile, known, k, keys, selector, key, scale, num_tokens, SCORE_BIAS, SELECTION, PARAMS,
        VARIANT, SHAPE, False, TILE.rows, TILE.keys,
    )  # fmt: skip
    seen = seen_by(tile, key, False, TILE.rows, TILE.keys, MASKED)
    if STATISTICS_ONLY:
        running_max, denominator = UPDATE_STATISTICS(s, seen, running_max, denominator, known)
    else:
        weights, rescale, running_max, denominator = UPDATE(
            s, seen, running_max, denominator, mean, per_spread, known, PARAMS
        )
        v = load_tile(keys.v, key, keys.v_stride, num_tokens, SHAPE, MASKED)
        output = multiply(weights.to(v.dtype), v, output * rescale[:, None])
    return running_max, denominator, output


@triton.jit
def attend_keys(
    tile, known, keys, selector, found, scale, num_tokens, mean, per_spread,
    UPDATE: tl.constexpr, SCORE_BIAS: tl.constexpr, UPDATE_STATISTICS: tl.constexpr,
    SELECTION: tl.constexpr, PARAMS: tl.constexpr, VARIANT: tl.constexpr, SHAPE: tl.constexpr,
    TILE: tl.constexpr, STATISTICS_ONLY: tl.constexpr,
):  # fmt: skip
    """Go along the keys of a `Range`. Returns `(running_max, denominator, output)`."""
    denominator = tl.full([TILE.rows], 0.0, tl.float32)
    running_max = denominator + VARIANT.first_max
    output = tl.full([TILE.rows, SHAPE.dims], 0.0, tl.float32)
    for start in range(found.inner, found.outer, TILE.keys):
        running_max, denominator, output = attend_tile(
            tile, known, keys, selector, start, scale, num_tokens, running_max, denominator,
            output, mean, per_spread, UPDATE, SCORE_BIAS, UPDATE_STATISTICS, SELECTION, PARAMS,
            VARIANT, SHAPE, TILE, STATISTICS_ONLY, False,
        )  # fmt: skip
    for number in range(0, edges(found, TILE.keys)):
        start = edge(found, number, TILE.keys)
        running_max, denominator, output = attend_tile(
            tile, known, keys, selector, start, scale, num_tokens, running_max, denominator,
            output, mean, per_spread, UPDATE, SCORE_BIAS, UPDATE_STATISTICS, SELECTION, PARAMS,
            VARIANT, SHAPE, TILE, STATISTICS_ONLY, True,
        )  # fmt: skip
    return running_max, denominator, output


@triton.jit(do_not_specialize=SIZES)
def forward_kernel(
    out, query, key, value, rows, units, snapshots,
    decays,  # of a gated variant, [2, 2, batch, num_heads, num_tokens] float32: see `training.py`
    statistics,  # [2 or 4, batch, num_heads, num_tokens] float32: `backward.load_statistics`
    first_learned, second_learned, scale, batch_size, num_tokens,
    out_batch, out_head, out_token, q_batch, q_head, q_token,
    k_batch, k_head, k_token, v_batch, v_head, v_token,
    QUERY_FACTOR: tl.constexpr, SCORE_BIAS: tl.constexpr, UPDATE: tl.constexpr,
    EPILOGUE: tl.constexpr, UPDATE_STATISTICS: tl.constexpr, FINISH_STATISTICS: tl.constexpr,
    SELECTION: tl.constexpr, PARAMS: tl.constexpr, VARIANT: tl.constexpr, SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Attend with one tile's queries. Grid: (batch * num_heads, tiles): the longest come first."""
    pair, number = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    batch, head = (pair // SHAPE.num_heads).to(tl.int64), pair % SHAPE.num_heads
    plane = batch_size * num_tokens
    rows += batch * num_tokens
    index = number * TILE.rows + tl.arange(0, TILE.rows)
    q_start = query + batch * q_batch + head.to(tl.int64) * q_head
    q = load_tile(q_start, index, q_token, num_tokens, SHAPE, True)
    place = pair.to(tl.int64) * num_tokens
    wide_plane = plane.to(tl.int64) * SHAPE.num_heads
    tile, known = describe(
        q, index, rows, plane, head, num_tokens, scale, first_learned, second_learned, decays,
        place, wide_plane, QUERY_FACTOR, PARAMS, VARIANT, SHAPE,
    )  # fmt: skip
    k_strides, v_strides = Strides(k_batch, k_head, k_token), Strides(v_batch, v_head, v_token)
    keys = keys_of(
        key, value, units, batch, head // SHAPE.group, num_tokens, k_strides, v_strides, SHAPE
    )  # fmt: skip
    selector = selector_of(
        query, key, rows, snapshots, batch, num_tokens, plane,
        Strides(q_batch, q_head, q_token), k_strides, TILE.rows,
    )  # fmt: skip
    found = seen_keys(tile, TILE.keys)
    mean = tl.full([TILE.rows], 0.0, tl.float32)
    per_spread = mean
    saved = statistics + place + index
    if UPDATE_STATISTICS is not None:
        maxima, sums, _ = attend_keys(
            tile, known, keys, selector, found, scale, num_tokens, mean, per_spread, UPDATE,
            SCORE_BIAS, UPDATE_STATISTICS, SELECTION, PARAMS, VARIANT, SHAPE, TILE, True,
        )  # fmt: skip
        mean, per_spread = FINISH_STATISTICS(maxima[:, None], sums[:, None], known)
        tl.store(saved + 2 * wide_plane, mean, mask=tile.inside)
        tl.store(saved + 3 * wide_plane, per_spread, mask=tile.inside)
    running_max, denominator, output = attend_keys(
        tile, known, keys, selector, found, scale, num_tokens, mean, per_spread, UPDATE,
        SCORE_BIAS, UPDATE_STATISTICS, SELECTION, PARAMS, VARIANT, SHAPE, TILE, False,
    )  # fmt: skip
    tl.store(saved, running_max, mask=tile.inside)
    tl.store(saved + wide_plane, denominator, mask=tile.inside)
    output *= EPILOGUE(running_max, denominator, known, PARAMS)[:, None]
    start = out + batch * out_batch + head.to(tl.int64) * out_head
    store_tile(start, index, out_token, num_tokens, output, SHAPE)
