"""Attention of a stateful variant within a budget: one page a request, by the rule of
`attn_kernels.pruning`.

A page holds keys `[num_kv_heads, budget, head_size]`, values likewise, and int32 accumulators and
positions `[budget]` each. Three kernels a step: `scan_kernel` finds out what every query sees,
`attend_kernel` attends, and only then `store_kernel` puts the new tokens into their slots, since
earlier queries may still have seen what was there.
"""

import triton
import triton.language as tl

from attn_kernels.triton.attention import LOG2E, find_request, multiply

NOBODY = tl.constexpr(-2)  # sources: an empty slot
STORED = tl.constexpr(-1)  # a token of an earlier step; others are indices of the step's own
LARGEST = tl.constexpr(2**31 - 1)
NEVER = tl.constexpr(-(2**62))


@triton.jit
def load_source(
    new, pages, source, slot, offset, new_stride, page_offset, dim,
    HEAD_SIZE: tl.constexpr,
):  # fmt: skip
    """The tokens `[slots, dims]` of a step (`new`) or a page, wherever each slot's is."""
    inside = (dim < HEAD_SIZE)[None, :]
    own = tl.load(
        new + (offset + source.to(tl.int64))[:, None] * new_stride + dim[None, :],
        mask=(source >= 0)[:, None] & inside, other=0.0,
    )  # fmt: skip
    kept = tl.load(
        pages + page_offset + slot[:, None] * HEAD_SIZE + dim[None, :],
        mask=(source == STORED)[:, None] & inside, other=0.0,
    )  # fmt: skip
    return tl.where((source >= 0)[:, None], own, kept)


@triton.jit
def scan_kernel(
    query, key, pages, block_table, query_start_loc, seq_lens,
    sources,  # [num_tokens, SLOTS] int32: which token each query sees in a slot
    penalties,  # [num_tokens, SLOTS] float32
    scale, query_stride, key_stride, page_stride, table_stride,
    NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BUDGET: tl.constexpr,
    SLOTS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """A request's tokens one by one: evicts, inserts, and adds head 0's selections. Grid:
    (num_reqs,)."""
    request = tl.program_id(0)
    start_loc = tl.load(query_start_loc + request)
    num_queries = tl.load(query_start_loc + request + 1) - start_loc
    if num_queries == 0:
        return
    num_before = tl.load(seq_lens + request) - num_queries
    page = tl.load(block_table + request.to(tl.int64) * table_stride).to(tl.int64) * page_stride
    numbers = (pages + page + 2 * NUM_KV_HEADS * BUDGET * HEAD_SIZE).to(tl.pointer_type(tl.int32))
    slot, dim = tl.arange(0, SLOTS), tl.arange(0, DIMS)
    taken = slot < tl.minimum(num_before, BUDGET)
    state = tl.load(numbers + slot, mask=taken, other=0)
    positions = tl.load(numbers + BUDGET + slot, mask=taken, other=0)
    source = tl.where(taken, STORED, NOBODY)
    for i in range(0, num_queries):
        position = num_before + i
        # The largest accumulator's slot, the oldest of equal ones, never the first token's.
        rank = (state.to(tl.int64) << 31) - positions
        rank = tl.where((source != NOBODY) & (positions != 0), rank, NEVER)
        full = position >= BUDGET
        new = tl.where(full, rank == tl.max(rank, 0), slot == position)
        state = tl.where(new, 0, state)
        positions = tl.where(new, position, positions)
        source = tl.where(new, i, source)
        token = (start_loc + i).to(tl.int64)
        tl.store(sources + token * SLOTS + slot, source)
        tl.store(penalties + token * SLOTS + slot, state.to(tl.float32) / 65536.0)

        mask = dim < HEAD_SIZE
        q = tl.load(query + token * query_stride + dim, mask=mask, other=0.0).to(tl.float32)
        k = load_source(key, pages, source, slot, start_loc, key_stride, page, dim, HEAD_SIZE)
        x = tl.sum(k.to(tl.float32) * q[None, :], 1) * scale
        units = tl.maximum(x, 0.0) * 65536.0
        whole = tl.where(units < 4194304.0, tl.floor(units + 0.5), units)  # beyond, it is whole
        whole = tl.minimum(whole, 2147483520.0).to(tl.int64)
        total = tl.minimum(state.to(tl.int64) + whole, LARGEST).to(tl.int32)
        chosen = (source != NOBODY) & (positions != 0) & ~new
        state = tl.where(chosen, total, state)
    kept = source != NOBODY
    tl.store(numbers + slot, state, mask=kept)
    tl.store(numbers + BUDGET + slot, positions, mask=kept)


@triton.jit
def attend_kernel(
    out, query, key, value, pages, block_table, query_start_loc, sources, penalties,
    scale, num_reqs,
    query_stride, key_stride, value_stride, out_stride, page_stride, table_stride,
    QUERY_FACTOR: tl.constexpr, START: tl.constexpr, WEIGH_TILE: tl.constexpr,
    FINISH: tl.constexpr, PARAMS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr, GROUP: tl.constexpr, HEAD_SIZE: tl.constexpr,
    BUDGET: tl.constexpr, SLOTS: tl.constexpr, DIMS: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """A query of all heads of a KV head against what the scan says it sees. Grid: (num_tokens,
    num_kv_heads)."""
    token, kv_head = tl.program_id(0), tl.program_id(1)
    request = find_request(query_start_loc, token, num_reqs, 1)
    start_loc = tl.load(query_start_loc + request)
    if token >= tl.load(query_start_loc + request + 1):  # padding
        return
    page = tl.load(block_table + request.to(tl.int64) * table_stride).to(tl.int64) * page_stride
    row, dim = tl.arange(0, ROWS), tl.arange(0, DIMS)
    head = kv_head * GROUP + row
    place = token.to(tl.int64)
    row_mask = (row < GROUP)[:, None] & (dim < HEAD_SIZE)[None, :]
    q = tl.load(
        query + place * query_stride + head[:, None] * HEAD_SIZE + dim[None, :],
        mask=row_mask, other=0.0,
    )  # fmt: skip
    one = tl.zeros([ROWS], tl.float32) + 1.0
    factor = QUERY_FACTOR(one, one, one, one, scale, HEAD_SIZE, PARAMS)
    top, total = START(one * 0.0)
    o = tl.zeros([ROWS, DIMS], tl.float32)
    for start in range(0, SLOTS, KEYS):
        slot = start + tl.arange(0, KEYS)
        source = tl.load(sources + place * SLOTS + slot)
        penalty = tl.load(penalties + place * SLOTS + slot)
        keys = page + kv_head * BUDGET * HEAD_SIZE
        k = load_source(
            key + kv_head * HEAD_SIZE, pages, source, slot, start_loc, key_stride, keys, dim,
            HEAD_SIZE,
        )  # fmt: skip
        values = page + (NUM_KV_HEADS + kv_head) * BUDGET * HEAD_SIZE
        v = load_source(
            value + kv_head * HEAD_SIZE, pages, source, slot, start_loc, value_stride, values, dim,
            HEAD_SIZE,
        )  # fmt: skip
        s = multiply(q, tl.trans(k.to(q.dtype)), tl.zeros([ROWS, KEYS], tl.float32))
        s = s * factor[:, None] - (penalty * LOG2E)[None, :]
        seen = ((source != NOBODY)[None, :]) & (row >= 0)[:, None]
        weights, rescale, top, total = WEIGH_TILE(s, seen, top, total, one, one, PARAMS)
        o = multiply(weights.to(q.dtype), v.to(q.dtype), o * rescale[:, None])
    o *= FINISH(top, total, PARAMS)[:, None]
    result = out + place * out_stride + head[:, None] * HEAD_SIZE + dim[None, :]
    tl.store(result, o.to(out.dtype.element_ty), mask=row_mask)


@triton.jit
def store_kernel(
    key, value, pages, block_table, query_start_loc, sources, num_reqs,
    key_stride, value_stride, page_stride, table_stride,
    NUM_KV_HEADS: tl.constexpr, HEAD_SIZE: tl.constexpr, BUDGET: tl.constexpr,
    SLOTS: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """A token into the slot in which the request's last query sees it, if it does. Grid:
    (num_tokens, num_kv_heads)."""
    token, kv_head = tl.program_id(0), tl.program_id(1)
    request = find_request(query_start_loc, token, num_reqs, 1)
    start_loc = tl.load(query_start_loc + request)
    end = tl.load(query_start_loc + request + 1)
    if token >= end:  # padding
        return
    slot, dim = tl.arange(0, SLOTS), tl.arange(0, DIMS)
    source = tl.load(sources + (end - 1).to(tl.int64) * SLOTS + slot)
    place = tl.max(tl.where(source == token - start_loc, slot, -1), 0)
    if place < 0:  # evicted by its own step
        return
    page = tl.load(block_table + request.to(tl.int64) * table_stride).to(tl.int64) * page_stride
    mask = dim < HEAD_SIZE
    head = kv_head * HEAD_SIZE + dim
    k = tl.load(key + token.to(tl.int64) * key_stride + head, mask=mask)
    v = tl.load(value + token.to(tl.int64) * value_stride + head, mask=mask)
    target = pages + page + (kv_head * BUDGET + place) * HEAD_SIZE + dim
    tl.store(target, k, mask=mask)
    tl.store(target + NUM_KV_HEADS * BUDGET * HEAD_SIZE, v, mask=mask)
