"""Paged attention, written once for all variants: a tile of query rows against a request's keys.

A tile has the queries `[first, first + QUERIES)` of one request and all `GROUP` query heads of one
KV head: `ROWS` rows of a matrix product (the last few may be empty). Its program walks the keys
that the tile sees, `KEYS` at a time; a long context is cut into `SPLITS` parts with a program each,
whose results `merge_kernel` adds up. The grid depends on the numbers of tokens and requests only,
so that a CUDA graph can hold it.

Inside its block each KV head has `BLOCK_SIZE` keys, then as many values, then (stateful variants)
as many float32 accumulators, of which KV head 0's are used: rows of keys and values are aligned.
"""

import triton
import triton.language as tl

BOTH, OBSERVE, WEIGH = (tl.constexpr(i) for i in range(3))
"""What a launch does of a variant that sees all scores before it weighs: both passes, or, where a
context is cut into parts, one of them. All others: BOTH."""

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def first_tile(start_loc, request, QUERIES: tl.constexpr):
    """The number of a request's first tile. Its last one may be short: this leaves room for that,
    so that no request reaches the next one's."""
    return start_loc // QUERIES + request if QUERIES > 1 else start_loc


@triton.jit
def find_request(query_start_loc, tile, num_reqs, QUERIES: tl.constexpr):
    """The request of a tile: the last whose first tile is not behind it."""
    low = 0
    high = num_reqs
    while low < high:
        middle = (low + high) // 2
        if first_tile(tl.load(query_start_loc + middle), middle, QUERIES) <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def load_blocks(block_table, request, table_stride, key, inside, BLOCK_SIZE: tl.constexpr):
    """Index in the cache of each key's block."""
    entry = block_table + request.to(tl.int64) * table_stride + key // BLOCK_SIZE
    return tl.load(entry, mask=inside, other=0).to(tl.int64)


@triton.jit
def load_keys(
    cache, block, kv_head, key, inside, block_stride, head_stride, dtype,
    BLOCK_SIZE: tl.constexpr, HEAD_SIZE: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Keys `[DIMS, KEYS]`; 0 where there are none."""
    dim = tl.arange(0, DIMS)
    base = block * block_stride + kv_head * head_stride + (key % BLOCK_SIZE) * HEAD_SIZE
    mask = inside[None, :] & (dim < HEAD_SIZE)[:, None]
    return tl.load(cache + base[None, :] + dim[:, None], mask=mask, other=0.0).to(dtype)


@triton.jit
def multiply(a, b, acc):
    """`acc + a @ b` in float32: no TF32, which keeps ten bits."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def visible(position, key, WINDOW: tl.constexpr):
    """Which keys each row sees, `[ROWS, KEYS]`."""
    distance = position[:, None] - key[None, :]
    seen = distance >= 0
    return seen & (distance < WINDOW) if WINDOW else seen


@triton.jit
def selections(x, seen, position, key):
    """What queries of head 0 with raw scores `x` add to the accumulators: nothing to their own
    token's and nothing to the first's."""
    chosen = seen & (key[None, :] != position[:, None]) & (key != 0)[None, :]
    return tl.where(chosen, tl.maximum(x, 0.0), 0.0)


@triton.jit
def attend_kernel(
    out, query, cache, block_table, query_start_loc, seq_lens,
    first_learned, second_learned,  # [num_heads] float32
    snapshots,  # [tiles, keys] float32: accumulators ahead of each tile (select.py)
    observed,  # [num_tokens, num_heads, SPLITS, 2] float32: the first pass's top and total
    part_rows,  # the same, of the parts' results
    part_outputs,  # [num_tokens, num_heads, SPLITS, HEAD_SIZE] float32
    key_scale, value_scale,  # [1] float32, of a quantized cache
    scale, num_reqs,
    query_stride, out_stride, block_stride, head_stride, table_stride, snapshot_stride,
    QUERY_FACTOR: tl.constexpr, START: tl.constexpr, WEIGH_TILE: tl.constexpr,
    FINISH: tl.constexpr, OBSERVE_TILE: tl.constexpr, SETTLE: tl.constexpr,
    UNIT_KEYS: tl.constexpr, STATEFUL: tl.constexpr, PARAMS: tl.constexpr,
    NUM_LEARNED: tl.constexpr, PASS: tl.constexpr, QUANTIZED: tl.constexpr,
    SOFT_CAP: tl.constexpr, WINDOW: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr,
    BLOCK_SIZE: tl.constexpr, DIMS: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Grid: (tiles, num_kv_heads, SPLITS)."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request = find_request(query_start_loc, tile, num_reqs, QUERIES)
    start_loc = tl.load(query_start_loc + request)
    num_queries = tl.load(query_start_loc + request + 1) - start_loc
    first = (tile - first_tile(start_loc, request, QUERIES)) * QUERIES
    if first >= num_queries:
        return
    first_position = tl.load(seq_lens + request) - num_queries  # of the request's queries here

    row, dim = tl.arange(0, ROWS), tl.arange(0, DIMS)
    index = first + row // GROUP
    valid = (row < QUERIES * GROUP) & (index < num_queries)
    position = first_position + index
    head = kv_head * GROUP + row % GROUP
    token = (start_loc + index).to(tl.int64)
    row_mask = valid[:, None] & (dim < HEAD_SIZE)[None, :]
    q_start = query + token[:, None] * query_stride + dim[None, :]
    q = tl.load(q_start + head[:, None] * HEAD_SIZE, mask=row_mask, other=0.0)

    n = position + 1
    if WINDOW:
        n = tl.minimum(n, WINDOW)
    n = tl.maximum(n, 1).to(tl.float32)  # empty rows, too, need finite factors
    norm = tl.zeros([ROWS], tl.float32)
    if UNIT_KEYS:
        norm = tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1))
    one = tl.zeros([ROWS], tl.float32) + 1.0
    one_learned, two_learned = one, one
    if NUM_LEARNED > 0:
        one_learned = tl.load(first_learned + head, mask=valid, other=0.0)
    if NUM_LEARNED > 1:
        two_learned = tl.load(second_learned + head, mask=valid, other=0.0)
    raw = scale  # of q.k, before a soft cap
    if QUANTIZED and not UNIT_KEYS:
        raw *= tl.load(key_scale)
    rest = 1.0 if SOFT_CAP > 0.0 else raw
    factor = QUERY_FACTOR(n, norm, one_learned, two_learned, rest, HEAD_SIZE, PARAMS)
    selecting = q
    if STATEFUL and QUERIES > 1:
        selecting = tl.load(q_start, mask=row_mask, other=0.0)  # head 0's

    begin = 0
    if WINDOW:
        begin = tl.maximum(first_position + first - WINDOW + 1, 0) // KEYS * KEYS
    end = first_position + tl.minimum(first + QUERIES, num_queries)
    if SPLITS > 1:
        keys_each = tl.cdiv(tl.cdiv(end - begin, KEYS), SPLITS) * KEYS
        begin += split * keys_each
        end = tl.minimum(end, begin + keys_each)
    result = (token * (NUM_KV_HEADS * GROUP) + head) * SPLITS + split  # of a row's part

    zeros = tl.zeros([ROWS], tl.float32)
    mean, per_spread = zeros, zeros
    if SETTLE is not None:
        if PASS == WEIGH:
            part = tl.arange(0, SPLITS)
            pair = observed + 2 * (result - split)[:, None] + 2 * part[None, :]
            tops = tl.load(pair, mask=valid[:, None], other=0.0)
            totals = tl.load(pair + 1, mask=valid[:, None], other=0.0)
        else:
            top, total = START(zeros)
            for start in range(begin, end, KEYS):
                key = start + tl.arange(0, KEYS)
                inside = key < end
                block = load_blocks(block_table, request, table_stride, key, inside, BLOCK_SIZE)
                k = load_keys(
                    cache, block, kv_head, key, inside, block_stride, head_stride, q.dtype,
                    BLOCK_SIZE, HEAD_SIZE, DIMS,
                )  # fmt: skip
                s = multiply(q, k, tl.zeros([ROWS, KEYS], tl.float32)) * factor[:, None]
                if UNIT_KEYS:
                    s *= unit(k)[None, :]
                seen = visible(position, key, WINDOW) & inside[None, :]
                top, total = OBSERVE_TILE(s, seen, top, total)
            if PASS == OBSERVE:
                tl.store(observed + 2 * result, top, mask=valid)
                tl.store(observed + 2 * result + 1, total, mask=valid)
                return
            tops, totals = top[:, None], total[:, None]
        mean, per_spread = SETTLE(tops, totals, n)

    top, total = START(zeros)
    o = tl.zeros([ROWS, DIMS], tl.float32)
    for start in range(begin, end, KEYS):
        key = start + tl.arange(0, KEYS)
        inside = key < end
        block = load_blocks(block_table, request, table_stride, key, inside, BLOCK_SIZE)
        k = load_keys(
            cache, block, kv_head, key, inside, block_stride, head_stride, q.dtype,
            BLOCK_SIZE, HEAD_SIZE, DIMS,
        )  # fmt: skip
        s = multiply(q, k, tl.zeros([ROWS, KEYS], tl.float32))
        if SOFT_CAP > 0.0:
            s = SOFT_CAP * tanh(s * (raw / SOFT_CAP))
        s *= factor[:, None]
        if UNIT_KEYS:
            s *= unit(k)[None, :]
        seen = visible(position, key, WINDOW) & inside[None, :]
        if STATEFUL:
            penalty = tl.load(
                snapshots + tile.to(tl.int64) * snapshot_stride + key, mask=inside, other=0.0
            )[None, :]
            if QUERIES > 1:
                # And what the tile's own queries before each row's have added.
                selector_keys = k
                if NUM_KV_HEADS > 1:
                    selector_keys = load_keys(
                        cache, block, 0, key, inside, block_stride, head_stride, q.dtype,
                        BLOCK_SIZE, HEAD_SIZE, DIMS,
                    )  # fmt: skip
                x = multiply(selecting, selector_keys, tl.zeros([ROWS, KEYS], tl.float32)) * raw
                added = selections(x, seen & valid[:, None], position, key)
                once = tl.where((row % GROUP == 0)[:, None], added, 0.0)
                penalty = penalty + tl.cumsum(once, 0) - added
            s -= penalty * LOG2E
        weights, rescale, top, total = WEIGH_TILE(s, seen, top, total, mean, per_spread, PARAMS)
        base = block * block_stride + kv_head * head_stride
        base += (BLOCK_SIZE + key % BLOCK_SIZE) * HEAD_SIZE
        value_mask = inside[:, None] & (dim < HEAD_SIZE)[None, :]
        v = tl.load(cache + base[:, None] + dim[None, :], mask=value_mask, other=0.0).to(q.dtype)
        o = multiply(weights.to(q.dtype), v, o * rescale[:, None])

    if QUANTIZED:
        o *= tl.load(value_scale)
    if SPLITS > 1:
        tl.store(part_rows + 2 * result, top, mask=valid)
        tl.store(part_rows + 2 * result + 1, total, mask=valid)
        tl.store(part_outputs + result[:, None] * HEAD_SIZE + dim[None, :], o, mask=row_mask)
    else:
        o *= FINISH(top, total, PARAMS)[:, None]
        place = out + token[:, None] * out_stride + head[:, None] * HEAD_SIZE + dim[None, :]
        tl.store(place, o.to(out.dtype.element_ty), mask=row_mask)


@triton.jit
def unit(k):
    """1 / |k| of keys `[DIMS, KEYS]`."""
    k = k.to(tl.float32)
    return 1.0 / tl.maximum(tl.sqrt(tl.sum(k * k, 0)), 1e-12)


@triton.jit
def tanh(x):
    e = tl.exp2(tl.abs(x) * (-2.0 * LOG2E))
    t = (1.0 - e) / (1.0 + e)
    return tl.where(x < 0.0, -t, t)


@triton.jit
def merge_kernel(
    out, part_rows, part_outputs, query_start_loc, num_reqs, out_stride,
    MERGE: tl.constexpr, FINISH: tl.constexpr, PARAMS: tl.constexpr,
    HEAD_SIZE: tl.constexpr, DIMS: tl.constexpr, SPLITS: tl.constexpr,
):  # fmt: skip
    """Adds up the parts of each row. Grid: (num_tokens, num_heads)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    if token >= tl.load(query_start_loc + num_reqs):
        return  # padding
    part, dim = tl.arange(0, SPLITS), tl.arange(0, DIMS)
    result = (token * tl.num_programs(1) + head) * SPLITS + part
    factors, top, total = MERGE(
        tl.load(part_rows + 2 * result), tl.load(part_rows + 2 * result + 1)
    )
    mask = (dim < HEAD_SIZE)[None, :]
    place = part_outputs + result[:, None] * HEAD_SIZE + dim[None, :]
    o = tl.sum(tl.load(place, mask=mask, other=0.0) * factors[:, None], 0)
    o *= FINISH(top, total, PARAMS)
    place = out + token * out_stride + head * HEAD_SIZE + dim
    tl.store(place, o.to(out.dtype.element_ty), mask=dim < HEAD_SIZE)
