"""Attention of a stateful variant within a budget: one page a request, by the rule of
`attn_kernels.pruning`.

A page holds keys `[num_kv_heads, budget, head_size]`, values likewise, head 0's keys where that is
another rank's, `[budget, head_size]`, and int32 accumulators and positions `[budget]` each. Three
kernels a step: `scan_kernel` finds out what every query sees, `attend_kernel` attends, and only
then `store_kernel` puts the new tokens into their slots, since earlier queries may still have seen
what was there.
"""

from typing import NamedTuple

import triton
import triton.language as tl

from attn_kernels.triton.attention import LOG2E, find_request
from attn_kernels.triton.cache import multiply
from attn_kernels.triton.variant import Query

NOBODY = tl.constexpr(-2)  # sources: an empty slot
STORED = tl.constexpr(-1)  # a token of an earlier step; others are indices of the step's own
LARGEST = tl.constexpr(2**31 - 1)
NEVER = tl.constexpr(-(2**62))


class PagedSlots(NamedTuple):
    """A layer and its pages, as compile-time arguments."""

    num_kv_heads: int
    group: int
    """Query heads of a KV head."""
    head_size: int
    dims: int
    """`head_size` rounded up to a power of two."""
    budget: int
    slots: int
    """`budget` rounded up to a power of two."""
    selecting_head: int
    """Which head of a page's keys and values are head 0's keys: one behind all others where head 0
    is another rank's."""


@triton.jit
def load_source(
    new, pages, source, slot, offset, new_stride, page_offset, dim,
    HEAD_SIZE: tl.constexpr,
):  # fmt: skip
    """Return the tokens `[slots, dims]` of a step (`new`) or a page, wherever each slot's is."""
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
    query, key,  # head 0's
    pages, block_table, query_start_loc, seq_lens,
    sources,  # [num_tokens, slots] int32: which token each query sees in a slot
    penalties,  # [num_tokens, slots] float32
    scale, query_stride, key_stride, page_stride, table_stride,
    SELECTION: tl.constexpr, PAGE: tl.constexpr,
):  # fmt: skip
    """Go through a request's tokens: evict, insert, and add head 0's selections. Grid:
    (num_reqs,)."""
    request = tl.program_id(0)
    start_loc = tl.load(query_start_loc + request)
    num_queries = tl.load(query_start_loc + request + 1) - start_loc
    if num_queries == 0:
        return
    num_before = tl.load(seq_lens + request) - num_queries
    page = tl.load(block_table + request.to(tl.int64) * table_stride).to(tl.int64) * page_stride
    heads: tl.constexpr = 2 * PAGE.num_kv_heads + (PAGE.selecting_head > 0)
    numbers = (pages + page + heads * PAGE.budget * PAGE.head_size).to(tl.pointer_type(tl.int32))
    keys = page + PAGE.selecting_head * PAGE.budget * PAGE.head_size
    slot, dim = tl.arange(0, PAGE.slots), tl.arange(0, PAGE.dims)
    taken = slot < tl.minimum(num_before, PAGE.budget)
    state = tl.load(numbers + slot, mask=taken, other=0)
    positions = tl.load(numbers + PAGE.budget + slot, mask=taken, other=0)
    source = tl.where(taken, STORED, NOBODY)
    for i in range(0, num_queries):
        position = num_before + i
        # The largest accumulator's slot, the oldest of equal ones, never the first token's.
        rank = (state.to(tl.int64) << 31) - positions
        rank = tl.where((source != NOBODY) & (positions != 0), rank, NEVER)
        full = position >= PAGE.budget
        new = tl.where(full, rank == tl.max(rank, 0), slot == position)
        state = tl.where(new, 0, state)
        positions = tl.where(new, position, positions)
        source = tl.where(new, i, source)
        token = (start_loc + i).to(tl.int64)
        tl.store(sources + token * PAGE.slots + slot, source)
        tl.store(penalties + token * PAGE.slots + slot, state.to(tl.float32) / 65536.0)

        mask = dim < PAGE.head_size
        q = tl.load(query + token * query_stride + dim, mask=mask, other=0.0).to(tl.float32)
        k = load_source(key, pages, source, slot, start_loc, key_stride, keys, dim, PAGE.head_size)
        x = tl.sum(k.to(tl.float32) * q[None, :], 1) * scale
        units = SELECTION(x) * 65536.0
        whole = tl.where(units < 4194304.0, tl.floor(units + 0.5), units)  # beyond, it is whole
        whole = tl.minimum(whole, 2147483520.0).to(tl.int64)
        total = tl.minimum(state.to(tl.int64) + whole, LARGEST).to(tl.int32)
        chosen = (source != NOBODY) & (positions != 0) & ~new
        state = tl.where(chosen, total, state)
    kept = source != NOBODY
    tl.store(numbers + slot, state, mask=kept)
    tl.store(numbers + PAGE.budget + slot, positions, mask=kept)


@triton.jit
def attend_kernel(
    out, query, key, value, pages, block_table, query_start_loc, seq_lens, sources, penalties,
    scale, num_reqs,
    query_stride, key_stride, value_stride, out_stride, page_stride, table_stride,
    QUERY_FACTOR: tl.constexpr, UPDATE: tl.constexpr, EPILOGUE: tl.constexpr,
    PARAMS: tl.constexpr, VARIANT: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Attend with all query heads of a KV head to what the scan says they see. Grid: (num_tokens,
    num_kv_heads)."""
    token, kv_head = tl.program_id(0), tl.program_id(1)
    request = find_request(query_start_loc, token, num_reqs, 1)
    start_loc = tl.load(query_start_loc + request)
    if token >= tl.load(query_start_loc + request + 1):  # padding
        return
    page = tl.load(block_table + request.to(tl.int64) * table_stride).to(tl.int64) * page_stride
    row, dim = tl.arange(0, ROWS), tl.arange(0, PAGE.dims)
    head = kv_head * PAGE.group + row
    place = token.to(tl.int64)
    row_mask = (row < PAGE.group)[:, None] & (dim < PAGE.head_size)[None, :]
    q = tl.load(
        query + place * query_stride + head[:, None] * PAGE.head_size + dim[None, :],
        mask=row_mask, other=0.0,
    )  # fmt: skip
    one = tl.zeros([ROWS], tl.float32) + 1.0
    behind = tl.load(query_start_loc + request + 1) - token
    position = row * 0 + tl.load(seq_lens + request) - behind
    n = tl.minimum(position + 1, PAGE.budget).to(tl.float32)
    norm = tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1))
    known = Query(head, position, n, norm, one, one)
    factor = QUERY_FACTOR(known, scale, PAGE.head_size, PARAMS)
    running_max, denominator = one * 0.0 + VARIANT.first_max, one * 0.0
    o = tl.full([ROWS, PAGE.dims], 0.0, tl.float32)
    for start in range(0, PAGE.slots, KEYS):
        slot = start + tl.arange(0, KEYS)
        source = tl.load(sources + place * PAGE.slots + slot)
        penalty = tl.load(penalties + place * PAGE.slots + slot)
        keys = page + kv_head * PAGE.budget * PAGE.head_size
        k = load_source(
            key + kv_head * PAGE.head_size, pages, source, slot, start_loc, key_stride, keys, dim,
            PAGE.head_size,
        )  # fmt: skip
        values = page + (PAGE.num_kv_heads + kv_head) * PAGE.budget * PAGE.head_size
        v = load_source(
            value + kv_head * PAGE.head_size, pages, source, slot, start_loc, value_stride, values,
            dim, PAGE.head_size,
        )  # fmt: skip
        s = multiply(q, tl.trans(k.to(q.dtype)), tl.zeros([ROWS, KEYS], tl.float32))
        s = s * factor[:, None] - (penalty * LOG2E)[None, :]
        seen = ((source != NOBODY)[None, :]) & (row >= 0)[:, None]
        weights, rescale, running_max, denominator = UPDATE(
            s, seen, running_max, denominator, one, one, known, PARAMS
        )
        o = multiply(weights.to(q.dtype), v.to(q.dtype), o * rescale[:, None])
    o *= EPILOGUE(running_max, denominator, known, PARAMS)[:, None]
    result = out + place * out_stride + head[:, None] * PAGE.head_size + dim[None, :]
    tl.store(result, o.to(out.dtype.element_ty), mask=row_mask)


@triton.jit
def store_kernel(
    key, value,
    selecting,  # head 0's keys, where PAGE has a head for them
    pages, block_table, query_start_loc, sources, num_reqs,
    key_stride, value_stride, selecting_stride, page_stride, table_stride,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Store a token in the slot in which the request's last query sees it, if it does. Grid:
    (num_tokens, num_kv_heads, and one more where there are selecting keys)."""
    token, kv_head = tl.program_id(0), tl.program_id(1)
    request = find_request(query_start_loc, token, num_reqs, 1)
    start_loc = tl.load(query_start_loc + request)
    end = tl.load(query_start_loc + request + 1)
    if token >= end:  # padding
        return
    slot, dim = tl.arange(0, PAGE.slots), tl.arange(0, PAGE.dims)
    source = tl.load(sources + (end - 1).to(tl.int64) * PAGE.slots + slot)
    place = tl.max(tl.where(source == token - start_loc, slot, -1), 0)
    if place < 0:  # evicted by its own step
        return
    page = tl.load(block_table + request.to(tl.int64) * table_stride).to(tl.int64) * page_stride
    mask = dim < PAGE.head_size
    if PAGE.selecting_head > 0:  # noqa: SIM102 (known when it is compiled)
        if kv_head == PAGE.num_kv_heads:
            k = tl.load(selecting + token.to(tl.int64) * selecting_stride + dim, mask=mask)
            keys = pages + page + PAGE.selecting_head * PAGE.budget * PAGE.head_size
            tl.store(keys + place * PAGE.head_size + dim, k, mask=mask)
            return
    head = kv_head * PAGE.head_size + dim
    k = tl.load(key + token.to(tl.int64) * key_stride + head, mask=mask)
    v = tl.load(value + token.to(tl.int64) * value_stride + head, mask=mask)
    target = pages + page + (kv_head * PAGE.budget + place) * PAGE.head_size + dim
    tl.store(target, k, mask=mask)
    tl.store(target + PAGE.num_kv_heads * PAGE.budget * PAGE.head_size, v, mask=mask)
