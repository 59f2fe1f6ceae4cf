"""Paged attention, written once for all variants: a tile of query rows against a request's keys.

A tile has `queries` consecutive queries of one request and all `group` query heads of one KV head:
`rows` rows of a matrix product (the last few may be empty). Its program goes along the keys that
the tile sees, `keys` at a time, with masks only where some row does not see some key; a long
context is cut into `splits` parts with a program each, whose results `merge_kernel` adds up. The
grid depends on the numbers of tokens and requests and on the longest context they may have, so that
a CUDA graph can hold it.

What is fixed when a kernel is compiled comes as named tuples: VARIANT (`variant.Constants`), SHAPE
(`tiles.Shape`) and TILE (`tiles.Tiling`). A variant's functions and parameters come one by one:
Triton cannot write down a tuple of functions where a hook watches compilations, as vLLM's does, and
Triton 3.6 cannot pass on a tuple inside a tuple.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attn_kernels.triton.cache import (
    Blocks,
    add_values,
    along,
    find_parameters,
    find_state,
    load_blocks,
    load_keys,
    load_tile_blocks,
    load_values,
    score_keys,
    tile_offsets,
    unit,
)
from attn_kernels.triton.gates import load_sums
from attn_kernels.triton.kv_quant import rotate
from attn_kernels.triton.selections import Selectors, add_before, load_selectors, selected
from attn_kernels.triton.special import INTERPRETED
from attn_kernels.triton.tiles import SIZES, STEP, find_request, first_tile, visible
from attn_kernels.triton.variant import Query

WHOLE, STATISTICS, OUTPUT = (tl.constexpr(i) for i in range(3))
"""What a launch computes for a variant that needs statistics of all scores first: all of it, or,
where a context is cut into parts, the statistics or the output. For all others: WHOLE."""

LOG2E = tl.constexpr(1.4426950408889634)


class Rows(NamedTuple):
    """The query rows of a tile: `q` `[rows, dims]`, all others `[rows]`."""

    q: Any
    valid: Any
    scores: Any
    """Where its scores are kept between two passes."""
    factor: Any
    """What q.k is multiplied with, see `query_factor`."""
    position: Any
    slope: Any
    """ALiBi's, times log2(e)."""
    sums: Any
    rests: Any
    """Of the gates up to each row's own token, of a gated variant."""


@triton.jit
def tanh(x):
    """Return the hyperbolic tangent."""
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def known_of(
    position, head, q, valid, first_learned, second_learned,
    VARIANT: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Return what is known of rows of queries `q` `[R, dims]`; what nobody asks for is not
    computed."""
    n = position + 1
    if SHAPE.window:
        n = tl.minimum(n, SHAPE.window)
    n = tl.maximum(n, 1).to(tl.float32)  # empty rows, too, need finite factors
    norm = tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1))
    first, second = n * 0.0 + 1.0, n * 0.0 + 1.0
    if VARIANT.num_learned > 0:
        first = tl.load(first_learned + head, mask=valid, other=0.0)
    if VARIANT.num_learned > 1:
        second = tl.load(second_learned + head, mask=valid, other=0.0)
    return Query(head, position, n, norm, first, second)


@triton.jit
def attend_keys(
    rows, selectors, known, blocks, kv_head, begin, end, first_position, last_position, scale,
    snapshots, running_max, denominator, mean, per_spread,
    UPDATE: tl.constexpr, SCORE_BIAS: tl.constexpr, UPDATE_STATISTICS: tl.constexpr,
    SELECTION: tl.constexpr, PARAMS: tl.constexpr, VARIANT: tl.constexpr, SHAPE: tl.constexpr,
    TILE: tl.constexpr, STATISTICS_ONLY: tl.constexpr,
):  # fmt: skip
    """Go along the keys [begin, end) of a tile, `begin` a multiple of TILE.keys: gather statistics
    of the scores, or turn them into weights and add up the values. `scale` is the model's, the
    tile's queries are from `first_position` to `last_position`.

    Returns:
        `(running_max [rows], denominator [rows], output [rows, dims])`.
    """
    output = tl.full([TILE.rows, SHAPE.dims], 0.0, tl.float32)
    # Where queries are multiplied in registers, those of two loops would not find room: in float32,
    # and of large heads with those of head 0. (The interpreter has none, and float32 shows best
    # whether the loops are right.)
    in_registers: tl.constexpr = rows.q.dtype == tl.float32 and not INTERPRETED
    once: tl.constexpr = in_registers or (SELECTION is not None and SHAPE.dims > 128)
    if once:
        lead, full = begin, begin
    else:
        # From `lead` on the last query sees all keys of a window, up to `full` the first one does
        # (and none is its own, for whose sake alone a stateful variant would have to look).
        lead = begin
        if SHAPE.window:
            unseen = tl.maximum(last_position - SHAPE.window + 1 - begin, 0)
            lead = tl.minimum(begin + tl.cdiv(unseen, TILE.keys) * TILE.keys, end)
        ahead = tl.minimum(first_position + (SELECTION is None), end) - begin
        full = tl.maximum(begin + tl.maximum(ahead, 0) // TILE.keys * TILE.keys, lead)
    oldest = begin
    if SHAPE.window:
        oldest = first_position - SHAPE.window + 1
    for part in tl.static_range(3):
        if part == 0:
            start_of, end_of = begin, lead
        elif part == 1:
            start_of, end_of = lead, full
        else:
            start_of, end_of = full, end
        if part == 2 or (not once and (part == 1 or SHAPE.window > 0)):
            running_max, denominator, output = attend_range(
                rows, selectors, known, blocks, kv_head, start_of, end_of, oldest, end, scale,
                snapshots, running_max, denominator, output, mean, per_spread, UPDATE, SCORE_BIAS,
                UPDATE_STATISTICS, SELECTION, PARAMS, VARIANT, SHAPE, TILE, STATISTICS_ONLY,
                part != 1, 1 if part != 1 and not once else None,
            )  # fmt: skip
    return running_max, denominator, output


@triton.jit
def attend_range(
    rows, selectors, known, blocks, kv_head, begin, end, oldest, last, scale, snapshots,
    running_max, denominator, output, mean, per_spread,
    UPDATE: tl.constexpr, SCORE_BIAS: tl.constexpr, UPDATE_STATISTICS: tl.constexpr,
    SELECTION: tl.constexpr, PARAMS: tl.constexpr, VARIANT: tl.constexpr, SHAPE: tl.constexpr,
    TILE: tl.constexpr, STATISTICS_ONLY: tl.constexpr, MASKED: tl.constexpr,
    NUM_STAGES: tl.constexpr,
):  # fmt: skip
    """Do what `attend_keys` does with the keys [begin, end) of a tile, which sees [oldest, last):
    what is before a window may be another request's. Not MASKED: all rows see all of them."""
    dtype = rows.q.dtype
    zeros = tl.full([TILE.rows, TILE.keys], 0.0, tl.float32)
    # A tile's blocks are looked up a tile ahead: copies that depend on nothing of their own
    # iteration overlap the products.
    next_block = load_tile_blocks(blocks, begin, end, SHAPE, TILE.keys)
    for start in tl.range(begin, end, TILE.keys, num_stages=NUM_STAGES):
        key = start + tl.arange(0, TILE.keys)
        inside = key < last
        if SHAPE.window:
            inside &= key >= oldest
        seen = visible(rows.position, key, SHAPE.window) & inside[None, :]
        if not MASKED:
            inside = tl.full([TILE.keys], True, tl.int1)
            seen = tl.full([TILE.rows, TILE.keys], True, tl.int1)
        block, offset = next_block, tile_offsets(start, SHAPE, TILE.keys)
        next_block = load_tile_blocks(blocks, start + TILE.keys, end, SHAPE, TILE.keys)
        kept = rows.scores[:, None] + key[None, :]
        if TILE.keeps_scores and not STATISTICS_ONLY:
            s = tl.load(kept, mask=rows.valid[:, None] & inside[None, :], other=0.0)
        else:
            k = load_keys(blocks, block, kv_head, offset, inside, dtype, SHAPE)
            words = find_parameters(blocks, block, kv_head, offset, False, SHAPE)
            s = score_keys(rows.q, k, words, inside, zeros, SHAPE)
            s *= rows.factor[:, None]
            if VARIANT.unit_keys:
                s *= unit(k, words, inside, SHAPE, TILE.rows)[None, :]
            if SHAPE.soft_cap > 0.0:
                s = SHAPE.soft_cap * LOG2E * tanh(s / (SHAPE.soft_cap * LOG2E))
            distance = (rows.position[:, None] - key[None, :]).to(tl.float32)
            if SHAPE.alibi:
                s -= rows.slope[:, None] * distance
            if VARIANT.gated:
                member = (known.head % SHAPE.group)[:, None]
                if SHAPE.group == 1:  # no sum is loaded twice
                    member = tl.full([1, 1], 0, tl.int32)
                sums, rests = load_sums(
                    blocks, along(block, 1), kv_head, member, offset[None, :], inside[None, :],
                    SHAPE,
                )  # fmt: skip
                decay = (rows.sums[:, None] - sums) + (rows.rests[:, None] - rests)
                s += SCORE_BIAS(known, distance, decay, PARAMS)
            elif SCORE_BIAS is not None:
                s += SCORE_BIAS(known, distance, PARAMS)
        if STATISTICS_ONLY:
            if TILE.keeps_scores:
                tl.store(kept, s, mask=rows.valid[:, None] & inside[None, :])
            running_max, denominator = UPDATE_STATISTICS(s, seen, running_max, denominator, known)
        else:
            if SELECTION is not None:
                if TILE.decode:
                    ahead = find_state(blocks, block, 0, SHAPE) + offset
                else:
                    ahead = snapshots + key
                penalty = zeros + tl.load(ahead, mask=inside, other=0.0)[None, :]
                if TILE.queries > 1:
                    # And what the tile's own queries before each row's have added.
                    selector_keys = k
                    if SHAPE.num_kv_heads > 1 or SHAPE.selecting_head > 0:
                        selector_keys = load_keys(
                            blocks, block, SHAPE.selecting_head, offset, inside, dtype, SHAPE
                        )
                        words = find_parameters(
                            blocks, block, SHAPE.selecting_head, offset, False, SHAPE
                        )
                    added = selected(
                        selectors, selector_keys, words, key, inside, scale,
                        SELECTION, SHAPE, MASKED,
                    )  # fmt: skip
                    penalty = add_before(selectors, added, penalty)
                s -= penalty * LOG2E
            weights, rescale, running_max, denominator = UPDATE(
                s, seen, running_max, denominator, mean, per_spread, known, PARAMS
            )
            v = load_values(blocks, block, kv_head, offset, inside, dtype, SHAPE)
            words = find_parameters(blocks, block, kv_head, offset, True, SHAPE)
            # One that divides by the keys' lengths in a single pass knows no row's largest weight.
            small: tl.constexpr = VARIANT.unit_keys and UPDATE_STATISTICS is None
            output *= rescale[:, None]
            output = add_values(weights, v, words, inside, output, small, SHAPE)
    return running_max, denominator, output


@triton.jit(do_not_specialize=SIZES, do_not_specialize_on_alignment=STEP)
def attend_kernel(
    out, query,
    selectors,  # [num_tokens, head_size]: head 0's queries, of a stateful variant
    cache, block_table, query_start_loc, seq_lens,
    first_learned, second_learned, alibi_slopes,  # [num_heads] float32
    snapshots,  # [tiles, keys] float32: accumulators ahead of each tile, but in a decode
    statistics,  # [num_tokens, num_heads, splits, 2] float32, of the pass for statistics
    scores,  # [num_tokens, num_heads, keys] float32, likewise
    part_rows,  # the same: each part's running maximum and denominator
    part_outputs,  # [num_tokens, num_heads, splits, head_size] float32
    key_scale, value_scale,  # [1] float32, of a quantized cache
    scale, num_reqs,
    query_stride, selector_stride, out_stride, block_stride, head_stride, table_stride,
    snapshot_stride, score_stride,
    QUERY_FACTOR: tl.constexpr, SCORE_BIAS: tl.constexpr, UPDATE: tl.constexpr,
    EPILOGUE: tl.constexpr, UPDATE_STATISTICS: tl.constexpr, FINISH_STATISTICS: tl.constexpr,
    SELECTION: tl.constexpr, PARAMS: tl.constexpr, VARIANT: tl.constexpr, SHAPE: tl.constexpr,
    TILE: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """Attend with one tile's queries. Grid: (tiles * num_kv_heads, splits).

    The last tiles of a request, which see the most keys, start first; the KV heads of a tile start
    together."""
    program, split = tl.program_id(0), tl.program_id(1)
    kv_head = program % SHAPE.num_kv_heads
    tile = (tl.num_programs(0) - 1 - program) // SHAPE.num_kv_heads
    request = find_request(query_start_loc, tile, num_reqs, TILE.queries)
    start_loc = tl.load(query_start_loc + request)
    num_queries = tl.load(query_start_loc + request + 1) - start_loc
    first = (tile - first_tile(start_loc, request, TILE.queries)) * TILE.queries
    if first >= num_queries:
        return
    first_position = tl.load(seq_lens + request) - num_queries  # of the request's queries here

    row, dim = tl.arange(0, TILE.rows), tl.arange(0, SHAPE.dims)
    index = first + row // SHAPE.group
    valid = (row < TILE.queries * SHAPE.group) & (index < num_queries)
    position = first_position + index
    head = kv_head * SHAPE.group + row % SHAPE.group
    token = (start_loc + index).to(tl.int64)
    row_mask = valid[:, None] & (dim < SHAPE.head_size)[None, :]
    q_start = query + token[:, None] * query_stride + dim[None, :]
    q = tl.load(q_start + head[:, None] * SHAPE.head_size, mask=row_mask, other=0.0)
    known = known_of(
        position, head, q, valid, first_learned, second_learned, VARIANT, SHAPE
    )  # fmt: skip
    zeros = tl.full([TILE.rows], 0.0, tl.float32)
    if SHAPE.quantized and not VARIANT.unit_keys:
        scale *= tl.load(key_scale)
    factor = QUERY_FACTOR(known, scale, SHAPE.head_size, PARAMS)
    if SHAPE.kv_bits == 4:  # as the keys are
        q = rotate(q, TILE.rows, SHAPE.dims, SHAPE.head_size)
    slope = zeros
    if SHAPE.alibi:
        slope = LOG2E * tl.load(alibi_slopes + head, mask=valid, other=0.0)
    table = block_table + request.to(tl.int64) * table_stride
    blocks = Blocks(cache, table, block_stride, head_stride)
    sums, rests = zeros, zeros
    if VARIANT.gated:
        block = load_blocks(blocks, position, valid, SHAPE)
        offset = position % SHAPE.block_size
        sums, rests = load_sums(blocks, block, kv_head, row % SHAPE.group, offset, valid, SHAPE)
    num_heads: tl.constexpr = SHAPE.num_kv_heads * SHAPE.group
    kept = position  # of which nothing is used
    if TILE.keeps_scores:
        kept = scores + (token * num_heads + head) * score_stride
    rows = Rows(q, valid, kept, factor, position, slope, sums, rests)
    selecting = Selectors(q, position, valid, q)  # of which nothing is used
    if SELECTION is not None and TILE.queries > 1:
        selecting = load_selectors(
            selectors, selector_stride, start_loc, first, num_queries, first_position,
            row // SHAPE.group, SHAPE, TILE,
        )  # fmt: skip

    begin = 0
    if SHAPE.window:
        begin = tl.maximum(first_position + first - SHAPE.window + 1, 0) // TILE.keys * TILE.keys
    end = first_position + tl.minimum(first + TILE.queries, num_queries)
    oldest, newest = first_position + first, end - 1
    if TILE.splits > 1:
        keys_each = tl.cdiv(tl.cdiv(end - begin, TILE.keys), TILE.splits) * TILE.keys
        begin += split * keys_each
        end = tl.maximum(tl.minimum(end, begin + keys_each), begin)
    part = (token * num_heads + head) * TILE.splits + split  # of a row
    if SELECTION is not None and not TILE.decode:
        snapshots += tile.to(tl.int64) * snapshot_stride

    mean, per_spread = zeros, zeros
    running_max, denominator = zeros + VARIANT.first_max, zeros
    if UPDATE_STATISTICS is not None:
        if PASS == OUTPUT:
            parts = tl.arange(0, TILE.splits)
            pairs = statistics + 2 * (part - split)[:, None] + 2 * parts[None, :]
            maxima = tl.load(pairs, mask=valid[:, None], other=0.0)
            sums = tl.load(pairs + 1, mask=valid[:, None], other=0.0)
        else:
            row_max, row_sum, _ = attend_keys(
                rows, selecting, known, blocks, kv_head, begin, end, oldest, newest, scale,
                snapshots, running_max, denominator, mean, per_spread, UPDATE, SCORE_BIAS,
                UPDATE_STATISTICS, SELECTION, PARAMS, VARIANT, SHAPE, TILE, True,
            )  # fmt: skip
            if PASS == STATISTICS:
                tl.store(statistics + 2 * part, row_max, mask=valid)
                tl.store(statistics + 2 * part + 1, row_sum, mask=valid)
                return
            maxima, sums = row_max[:, None], row_sum[:, None]
        mean, per_spread = FINISH_STATISTICS(maxima, sums, known)

    running_max, denominator, output = attend_keys(
        rows, selecting, known, blocks, kv_head, begin, end, oldest, newest, scale, snapshots,
        running_max, denominator, mean, per_spread, UPDATE, SCORE_BIAS, UPDATE_STATISTICS,
        SELECTION, PARAMS, VARIANT, SHAPE, TILE, False,
    )  # fmt: skip
    if SHAPE.quantized:
        output *= tl.load(value_scale)
    if SHAPE.kv_bits == 4:
        output = rotate(output, TILE.rows, SHAPE.dims, SHAPE.head_size)
    if TILE.splits > 1:
        tl.store(part_rows + 2 * part, running_max, mask=valid)
        tl.store(part_rows + 2 * part + 1, denominator, mask=valid)
        place = part_outputs + part[:, None] * SHAPE.head_size + dim[None, :]
        tl.store(place, output, mask=row_mask)
    else:
        output *= EPILOGUE(running_max, denominator, known, PARAMS)[:, None]
        place = out + token[:, None] * out_stride + head[:, None] * SHAPE.head_size + dim[None, :]
        tl.store(place, output.to(out.dtype.element_ty), mask=row_mask)


@triton.jit(do_not_specialize=["num_reqs"], do_not_specialize_on_alignment=STEP[1:])
def merge_kernel(
    out, query, part_rows, part_outputs, query_start_loc, seq_lens, first_learned, second_learned,
    num_reqs, query_stride, out_stride,
    MERGE: tl.constexpr, EPILOGUE: tl.constexpr, PARAMS: tl.constexpr, VARIANT: tl.constexpr,
    SHAPE: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Add up the parts of each row. Grid: (num_tokens, num_heads)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if token >= tl.load(query_start_loc + num_reqs):
        return  # padding
    part, dim = tl.arange(0, SPLITS), tl.arange(0, SHAPE.dims)
    part = (token * tl.num_programs(1) + head) * SPLITS + part
    factors, running_max, denominator = MERGE(
        tl.load(part_rows + 2 * part), tl.load(part_rows + 2 * part + 1)
    )
    mask = (dim < SHAPE.head_size)[None, :]
    place = part_outputs + part[:, None] * SHAPE.head_size + dim[None, :]
    o = tl.sum(tl.load(place, mask=mask, other=0.0) * factors[:, None], 0)
    request = find_request(query_start_loc, token, num_reqs, 1)
    behind = tl.load(query_start_loc + request + 1) - token
    one = tl.zeros([1], tl.int32)
    position = one + (tl.load(seq_lens + request) - behind).to(tl.int32)
    place = query + token * query_stride + head * SHAPE.head_size + dim
    q = tl.load(place, mask=dim < SHAPE.head_size, other=0.0)[None, :]
    known = known_of(
        position, one + head, q, one == 0, first_learned, second_learned, VARIANT, SHAPE
    )  # fmt: skip
    o *= EPILOGUE(running_max, denominator, known, PARAMS)
    place = out + token * out_stride + head * SHAPE.head_size + dim
    tl.store(place, o.to(out.dtype.element_ty), mask=dim < SHAPE.head_size)
