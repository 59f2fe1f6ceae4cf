"""The derivatives of `dense.py`'s attention.

Two kernels: one along the keys of a tile of queries, one along the queries of a tile of keys, so
that each sum is made by one program, in the same order every time. Scores are computed again in
both. What is kept of the forward is a few float32 of each row (`Saved`); how scores and weights
depend on one another is the variant's (`weights_backward` and others, `triton/variant.py`).
"""

import triton
import triton.language as tl

from attn_kernels.triton.attention import LOG2E
from attn_kernels.triton.cache import multiply
from attn_kernels.triton.dense import (
    SIZES,
    Strides,
    describe,
    edge,
    edges,
    keys_of,
    load_tile,
    of_rows,
    row_tile,
    scores_of,
    seeing_queries,
    seen_by,
    seen_keys,
    selector_of,
    store_tile,
)
from attn_kernels.triton.variant import Query, Saved

DELTA, THROUGH, FACTOR, LOG_TOTAL, SCORE_FACTOR, NORM = (tl.constexpr(i) for i in range(6))
"""What `queries_kernel` computes of each row for the kernels after it: `row_values`."""


@triton.jit
def load_statistics(statistics, place, plane, inside, STATISTICS_BACKWARD: tl.constexpr):
    """Return running maximum, denominator, mean and per_spread of rows."""
    running_max = tl.load(statistics + place, mask=inside, other=0.0)
    denominator = tl.load(statistics + plane + place, mask=inside, other=1.0)
    mean, per_spread = running_max * 0.0, running_max * 0.0
    if STATISTICS_BACKWARD is not None:
        mean = tl.load(statistics + 2 * plane + place, mask=inside, other=0.0)
        per_spread = tl.load(statistics + 3 * plane + place, mask=inside, other=0.0)
    return running_max, denominator, mean, per_spread


@triton.jit
def load_rows(
    q, index, row_values, statistics, rows, plane, row_start, wide_plane, head, num_tokens,
    first_learned, second_learned, decays,
    STATISTICS_BACKWARD: tl.constexpr, VARIANT: tl.constexpr,
):  # fmt: skip
    """Return `Tile`, `Query` and `Saved` of rows that `queries_kernel` has been at; `row_start` is
    where the head's begin in a plane of `row_values`. What nobody asks for is not loaded."""
    place = row_start + index
    inside = index < num_tokens
    begin = tl.load(rows + index, mask=inside, other=0)
    end = tl.load(rows + plane + index, mask=inside, other=0)
    position = tl.load(rows + 2 * plane + index, mask=inside, other=0)
    row_values += place
    delta = tl.load(row_values + DELTA * wide_plane, mask=inside, other=0.0)
    through = tl.load(row_values + THROUGH * wide_plane, mask=inside, other=0.0)
    factor = tl.load(row_values + FACTOR * wide_plane, mask=inside, other=0.0)
    log_total = tl.load(row_values + LOG_TOTAL * wide_plane, mask=inside, other=0.0)
    score_factor = tl.load(row_values + SCORE_FACTOR * wide_plane, mask=inside, other=0.0)
    norm = tl.load(row_values + NORM * wide_plane, mask=inside, other=0.0)
    running_max, denominator, mean, per_spread = load_statistics(
        statistics, place, wide_plane, inside, STATISTICS_BACKWARD
    )
    first, second = norm * 0.0 + 1.0, norm * 0.0 + 1.0
    if VARIANT.num_learned > 0:
        first *= tl.load(first_learned + head)
    if VARIANT.num_learned > 1:
        second *= tl.load(second_learned + head)
    n = tl.maximum(end - begin, 1).to(tl.float32)
    tile = row_tile(
        q, index, begin, end, inside, score_factor, decays, row_start, wide_plane, VARIANT
    )  # fmt: skip
    known = Query(index * 0 + head, position, n, norm, first, second)
    saved = Saved(
        running_max, denominator, factor, log_total, mean, per_spread, delta, through
    )  # fmt: skip
    return tile, known, saved


@triton.jit
def differentiate(
    tile, known, k, v, do, keys, selector, key, saved, scale, num_tokens,
    SCORE_BIAS: tl.constexpr, SELECTION: tl.constexpr, BACKWARD: tl.constexpr,
    PARAMS: tl.constexpr, VARIANT: tl.constexpr, SHAPE: tl.constexpr, TILE: tl.constexpr,
    BY_KEYS: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Return what BACKWARD, a variant's function, gives for a tile of keys, `[rows, keys]` or
    BY_KEYS `[keys, rows]`."""
    s = scores_of(
        tile, known, k, keys, selector, key, scale, num_tokens, SCORE_BIAS, SELECTION, PARAMS,
        VARIANT, SHAPE, BY_KEYS, TILE.rows, TILE.keys,
    )  # fmt: skip
    seen = seen_by(tile, key, BY_KEYS, TILE.rows, TILE.keys, MASKED)
    if BY_KEYS:
        dp = multiply(v, tl.trans(do), tl.full([TILE.keys, TILE.rows], 0.0, tl.float32))
    else:
        dp = multiply(do, tl.trans(v), tl.full([TILE.rows, TILE.keys], 0.0, tl.float32))
    saved = Saved(
        of_rows(saved.running_max, BY_KEYS), of_rows(saved.denominator, BY_KEYS),
        of_rows(saved.factor, BY_KEYS), of_rows(saved.log_total, BY_KEYS),
        of_rows(saved.mean, BY_KEYS), of_rows(saved.per_spread, BY_KEYS),
        of_rows(saved.delta, BY_KEYS), of_rows(saved.through, BY_KEYS),
    )  # fmt: skip
    known = Query(
        of_rows(known.head, BY_KEYS), of_rows(known.position, BY_KEYS), of_rows(known.n, BY_KEYS),
        of_rows(known.norm, BY_KEYS), of_rows(known.first, BY_KEYS),
        of_rows(known.second, BY_KEYS),
    )  # fmt: skip
    return BACKWARD(s, seen, dp, saved, known, PARAMS)


@triton.jit
def query_tile(
    tile, known, keys, selector, start, do, saved, scale, num_tokens, total, gradient,
    SCORE_BIAS: tl.constexpr, SELECTION: tl.constexpr, WEIGHTS_BACKWARD: tl.constexpr,
    STATISTICS_BACKWARD: tl.constexpr, PARAMS: tl.constexpr, VARIANT: tl.constexpr,
    SHAPE: tl.constexpr, TILE: tl.constexpr, STATISTICS_ONLY: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take up one tile of keys: into what goes through the statistics, `total` [rows], or into the
    products with keys, `gradient` [rows, dims], and of a gated variant into the sums of the scores'
    derivatives, `total`."""
    key = start + tl.arange(0, TILE.keys)
    k = load_tile(keys.k, key, keys.k_stride, num_tokens, SHAPE, MASKED)
    v = load_tile(keys.v, key, keys.v_stride, num_tokens, SHAPE, MASKED)
    if STATISTICS_ONLY:
        summands = differentiate(
            tile, known, k, v, do, keys, selector, key, saved, scale, num_tokens, SCORE_BIAS,
            SELECTION, STATISTICS_BACKWARD, PARAMS, VARIANT, SHAPE, TILE, False, MASKED,
        )  # fmt: skip
        total += tl.sum(summands, 1)
    else:
        _, ds = differentiate(
            tile, known, k, v, do, keys, selector, key, saved, scale, num_tokens, SCORE_BIAS,
            SELECTION, WEIGHTS_BACKWARD, PARAMS, VARIANT, SHAPE, TILE, False, MASKED,
        )  # fmt: skip
        if VARIANT.gated:
            total += tl.sum(ds, 1)
        if VARIANT.unit_keys:
            ds *= tl.load(keys.units + key, mask=key < num_tokens, other=0.0)[None, :]
        gradient = multiply(ds.to(k.dtype), k, gradient)
    return total, gradient


@triton.jit
def query_sums(
    tile, known, keys, selector, found, do, saved, scale, num_tokens,
    SCORE_BIAS: tl.constexpr, SELECTION: tl.constexpr, WEIGHTS_BACKWARD: tl.constexpr,
    STATISTICS_BACKWARD: tl.constexpr, PARAMS: tl.constexpr, VARIANT: tl.constexpr,
    SHAPE: tl.constexpr, TILE: tl.constexpr, STATISTICS_ONLY: tl.constexpr,
):  # fmt: skip
    """Go along the keys of a tile of queries. Returns `(total, gradient)`."""
    total = tl.full([TILE.rows], 0.0, tl.float32)
    gradient = tl.full([TILE.rows, SHAPE.dims], 0.0, tl.float32)
    for start in range(found.inner, found.outer, TILE.keys):
        total, gradient = query_tile(
            tile, known, keys, selector, start, do, saved, scale, num_tokens, total, gradient,
            SCORE_BIAS, SELECTION, WEIGHTS_BACKWARD, STATISTICS_BACKWARD, PARAMS, VARIANT, SHAPE,
            TILE, STATISTICS_ONLY, False,
        )  # fmt: skip
    for number in range(0, edges(found, TILE.keys)):
        start = edge(found, number, TILE.keys)
        total, gradient = query_tile(
            tile, known, keys, selector, start, do, saved, scale, num_tokens, total, gradient,
            SCORE_BIAS, SELECTION, WEIGHTS_BACKWARD, STATISTICS_BACKWARD, PARAMS, VARIANT, SHAPE,
            TILE, STATISTICS_ONLY, True,
        )  # fmt: skip
    return total, gradient


@triton.jit(do_not_specialize=SIZES)
def queries_kernel(
    d_query,
    row_values,  # [6, batch, num_heads, num_tokens] float32
    d_learned,  # [number of learned tensors, batch, num_heads, num_tokens] float32
    d_decays,  # of a gated variant, [2, batch, num_heads, num_tokens] float32: of rows, of keys
    d_out, out, query, key, value, rows, units, snapshots, decays, statistics,
    first_learned, second_learned, scale, batch_size, num_tokens,
    dq_batch, dq_head, dq_token, do_batch, do_head, do_token, out_batch, out_head, out_token,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    QUERY_FACTOR: tl.constexpr, SCORE_BIAS: tl.constexpr, EPILOGUE: tl.constexpr,
    SELECTION: tl.constexpr, WEIGHTS_BACKWARD: tl.constexpr, STATISTICS_BACKWARD: tl.constexpr,
    ROW_BACKWARD: tl.constexpr, PARAMS: tl.constexpr, VARIANT: tl.constexpr, SHAPE: tl.constexpr,
    TILE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one tile's queries, and what its rows give to those of the learned
    tensors. Grid: (batch * num_heads, tiles)."""
    pair, number = tl.program_id(0), tl.num_programs(1) - 1 - tl.program_id(1)
    batch, head = (pair // SHAPE.num_heads).to(tl.int64), pair % SHAPE.num_heads
    plane = batch_size * num_tokens
    rows += batch * num_tokens
    index = number * TILE.rows + tl.arange(0, TILE.rows)
    wide = head.to(tl.int64)
    q = load_tile(query + batch * q_batch + wide * q_head, index, q_token, num_tokens, SHAPE, True)
    start = d_out + batch * do_batch + wide * do_head
    do = load_tile(start, index, do_token, num_tokens, SHAPE, True)
    o = load_tile(
        out + batch * out_batch + wide * out_head, index, out_token, num_tokens, SHAPE, True
    )  # fmt: skip
    delta = tl.sum(do.to(tl.float32) * o.to(tl.float32), 1)
    row_start = pair.to(tl.int64) * num_tokens
    wide_plane = plane.to(tl.int64) * SHAPE.num_heads
    tile, known = describe(
        q, index, rows, plane, head, num_tokens, scale, first_learned, second_learned, decays,
        row_start, wide_plane, QUERY_FACTOR, PARAMS, VARIANT, SHAPE,
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
    place = row_start + index
    running_max, denominator, mean, per_spread = load_statistics(
        statistics, place, wide_plane, tile.inside, STATISTICS_BACKWARD
    )
    weight_factor = EPILOGUE(running_max, denominator, known, PARAMS)
    log_total = running_max - tl.log2(weight_factor)
    saved = Saved(
        running_max, denominator, weight_factor, log_total, mean, per_spread, delta, delta
    )  # fmt: skip
    row_values += place
    tl.store(row_values + DELTA * wide_plane, delta, mask=tile.inside)
    tl.store(row_values + FACTOR * wide_plane, weight_factor, mask=tile.inside)
    tl.store(row_values + LOG_TOTAL * wide_plane, log_total, mask=tile.inside)
    tl.store(row_values + SCORE_FACTOR * wide_plane, tile.factor, mask=tile.inside)
    tl.store(row_values + NORM * wide_plane, known.norm, mask=tile.inside)
    if STATISTICS_BACKWARD is not None:
        through, _ = query_sums(
            tile, known, keys, selector, found, do, saved, scale, num_tokens, SCORE_BIAS,
            SELECTION, WEIGHTS_BACKWARD, STATISTICS_BACKWARD, PARAMS, VARIANT, SHAPE, TILE, True,
        )  # fmt: skip
        tl.store(row_values + THROUGH * wide_plane, through, mask=tile.inside)
        saved = Saved(
            running_max, denominator, weight_factor, log_total, mean, per_spread, delta, through
        )  # fmt: skip
    total, gradient = query_sums(
        tile, known, keys, selector, found, do, saved, scale, num_tokens, SCORE_BIAS, SELECTION,
        WEIGHTS_BACKWARD, STATISTICS_BACKWARD, PARAMS, VARIANT, SHAPE, TILE, False,
    )  # fmt: skip
    if VARIANT.gated:
        tl.store(d_decays + place, total, mask=tile.inside)
    factor = tile.factor / LOG2E
    dq = gradient * factor[:, None]
    if ROW_BACKWARD is not None:
        wide_q = q.to(tl.float32)
        d_norm, d_first, d_second = ROW_BACKWARD(
            tl.sum(wide_q * gradient, 1), factor, saved, known, scale, PARAMS
        )
        dq += (d_norm / tl.maximum(known.norm, 1e-12))[:, None] * wide_q
        if VARIANT.num_learned > 0:
            tl.store(d_learned + place, d_first, mask=tile.inside)
        if VARIANT.num_learned > 1:
            tl.store(d_learned + wide_plane + place, d_second, mask=tile.inside)
    start = d_query + batch * dq_batch + wide * dq_head
    store_tile(start, index, dq_token, num_tokens, dq, SHAPE)


@triton.jit
def key_tile(
    query, d_out, statistics, row_values, rows, plane, wide_plane, head, row_start, start, k, v,
    keys, selector, key, scale, num_tokens, q_token, do_token, first_learned, second_learned,
    decays, dk, dv, total,
    SCORE_BIAS: tl.constexpr, SELECTION: tl.constexpr, WEIGHTS_BACKWARD: tl.constexpr,
    STATISTICS_BACKWARD: tl.constexpr, PARAMS: tl.constexpr, VARIANT: tl.constexpr,
    SHAPE: tl.constexpr, TILE: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """Take up one tile of queries of one head, whose `query` and `d_out` these are: into the
    gradients of keys and values [keys, dims], and of a gated variant into the sums of the scores'
    derivatives, `total` [keys]."""
    index = start + tl.arange(0, TILE.rows)
    q = load_tile(query, index, q_token, num_tokens, SHAPE, MASKED)
    do = load_tile(d_out, index, do_token, num_tokens, SHAPE, MASKED)
    tile, known, saved = load_rows(
        q, index, row_values, statistics, rows, plane, row_start, wide_plane, head, num_tokens,
        first_learned, second_learned, decays, STATISTICS_BACKWARD, VARIANT,
    )  # fmt: skip
    weights, ds = differentiate(
        tile, known, k, v, do, keys, selector, key, saved, scale, num_tokens, SCORE_BIAS,
        SELECTION, WEIGHTS_BACKWARD, PARAMS, VARIANT, SHAPE, TILE, True, MASKED,
    )  # fmt: skip
    dv = multiply(weights.to(do.dtype), do, dv)
    if VARIANT.gated:
        total += tl.sum(ds, 1)
    ds *= (tile.factor / LOG2E)[None, :]
    dk = multiply(ds.to(q.dtype), q, dk)
    return dk, dv, total


@triton.jit(do_not_specialize=SIZES)
def keys_kernel(
    d_key, d_value, d_decays, row_values, d_out, query, key, value, rows, units, snapshots, decays,
    statistics, first_learned, second_learned, scale, batch_size, num_tokens,
    dk_batch, dk_head, dk_token, dv_batch, dv_head, dv_token, do_batch, do_head, do_token,
    q_batch, q_head, q_token, k_batch, k_head, k_token, v_batch, v_head, v_token,
    SCORE_BIAS: tl.constexpr, SELECTION: tl.constexpr, WEIGHTS_BACKWARD: tl.constexpr,
    STATISTICS_BACKWARD: tl.constexpr, PARAMS: tl.constexpr, VARIANT: tl.constexpr,
    SHAPE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute the gradients of one tile's keys and values, of all query heads of a KV head. Grid:
    (batch * num_kv_heads, tiles)."""
    pair, number = tl.program_id(0), tl.program_id(1)
    num_kv_heads: tl.constexpr = SHAPE.num_heads // SHAPE.group
    batch, kv_head = (pair // num_kv_heads).to(tl.int64), pair % num_kv_heads
    plane = batch_size * num_tokens
    wide_plane = plane.to(tl.int64) * SHAPE.num_heads
    rows += batch * num_tokens
    key_index = number * TILE.keys + tl.arange(0, TILE.keys)
    k_strides, v_strides = Strides(k_batch, k_head, k_token), Strides(v_batch, v_head, v_token)
    keys = keys_of(
        key, value, units, batch, kv_head, num_tokens, k_strides, v_strides, SHAPE
    )  # fmt: skip
    selector = selector_of(
        query, key, rows, snapshots, batch, num_tokens, plane,
        Strides(q_batch, q_head, q_token), k_strides, TILE.rows,
    )  # fmt: skip
    k = load_tile(keys.k, key_index, keys.k_stride, num_tokens, SHAPE, True)
    v = load_tile(keys.v, key_index, keys.v_stride, num_tokens, SHAPE, True)
    found = seeing_queries(rows, plane, number * TILE.keys, num_tokens, TILE.rows, TILE.keys)
    dk = tl.full([TILE.keys, SHAPE.dims], 0.0, tl.float32)
    dv = tl.full([TILE.keys, SHAPE.dims], 0.0, tl.float32)
    for member in range(0, SHAPE.group):
        head = kv_head * SHAPE.group + member
        wide = head.to(tl.int64)
        q_start = query + batch * q_batch + wide * q_head
        do_start = d_out + batch * do_batch + wide * do_head
        row_start = (batch * SHAPE.num_heads + wide) * num_tokens
        total = tl.full([TILE.keys], 0.0, tl.float32)
        for start in range(found.inner, found.outer, TILE.rows):
            dk, dv, total = key_tile(
                q_start, do_start, statistics, row_values, rows, plane, wide_plane, head,
                row_start, start, k, v, keys, selector, key_index, scale, num_tokens, q_token,
                do_token, first_learned, second_learned, decays, dk, dv, total, SCORE_BIAS,
                SELECTION, WEIGHTS_BACKWARD, STATISTICS_BACKWARD, PARAMS, VARIANT, SHAPE, TILE,
                False,
            )  # fmt: skip
        for each in range(0, edges(found, TILE.rows)):
            start = edge(found, each, TILE.rows)
            dk, dv, total = key_tile(
                q_start, do_start, statistics, row_values, rows, plane, wide_plane, head,
                row_start, start, k, v, keys, selector, key_index, scale, num_tokens, q_token,
                do_token, first_learned, second_learned, decays, dk, dv, total, SCORE_BIAS,
                SELECTION, WEIGHTS_BACKWARD, STATISTICS_BACKWARD, PARAMS, VARIANT, SHAPE, TILE,
                True,
            )  # fmt: skip
        if VARIANT.gated:
            place = d_decays + wide_plane + row_start + key_index
            tl.store(place, -total, mask=key_index < num_tokens)
    if VARIANT.unit_keys:
        inside = key_index < num_tokens
        unit = tl.load(keys.units + key_index, mask=inside, other=0.0)[:, None]
        direction = k.to(tl.float32) * unit
        dk = unit * (dk - direction * tl.sum(direction * dk, 1)[:, None])
    start = d_key + batch * dk_batch + kv_head.to(tl.int64) * dk_head
    store_tile(start, key_index, dk_token, num_tokens, dk, SHAPE)
    start = d_value + batch * dv_batch + kv_head.to(tl.int64) * dv_head
    store_tile(start, key_index, dv_token, num_tokens, dv, SHAPE)
