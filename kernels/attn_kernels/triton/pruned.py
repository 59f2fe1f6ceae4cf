"""Attention of a stateful variant within a budget: one page a request, by the rule of
`attn_kernels.pruning`.

A page holds keys `[num_kv_heads, budget, head_size]`, values likewise, head 0's keys where that is
another rank's, `[budget, head_size]`, and int32 accumulators and positions `[budget]` each.

A step goes through its requests' tokens in chunks: of each request the tokens `first` to
`first + length`, for `first` = 0, `length`, ... Four kernels a chunk, since what a query adds to
the accumulators does not depend on what is evicted:

    `select_kernel`  what each query would add to each slot and to the chunk's own tokens, by
                     products, side by side
    `scan_kernel`    evictions, token after token: additions only
    `attend_kernel`  all queries side by side, with what the scan says that they find
    `store_kernel`   the chunk's tokens that are left, into the slots of those that they replaced,
                     where earlier queries may still have seen what was there

Of a request with one query nothing has to wait: `attend_kernel` stores it, and a step that has no
others is one chunk of three launches. Where these are few requests of a large budget, the slots are
cut into parts with a program each, which `attention.merge_kernel` adds up in a fourth.

Between the kernels goes a row of `accumulators` for each of a chunk's tokens, `[rows, width +
length]` int32: of the slots, then of the chunk's own tokens. What is launched depends on the
numbers of tokens and requests, so requests' rows begin where they would if all before had as many
tokens as they can have (`Chunk.row`).
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attn_kernels.triton.attention import LOG2E
from attn_kernels.triton.cache import multiply
from attn_kernels.triton.tiles import SIZES, STEP, first_tile
from attn_kernels.triton.variant import Query

LARGEST = tl.constexpr(2**31 - 1)

FIRST = tl.constexpr(-1)
"""In a scan, the accumulator of a request's first token, which is never evicted and to which
nothing is added."""
ABSENT = tl.constexpr(-2)
"""In a scan, the accumulator of a token that is not there; less 1 and the row of the token that
replaced it, if that was in the scan."""


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
    width: int
    """`budget` rounded up to a multiple of 16."""
    selecting_head: int
    """Which head of a page's keys and values are head 0's keys: one behind all others where head 0
    is another rank's."""


CHUNK = 256
"""Most tokens of a chunk. A step of more has more launches; in a chunk of more, queries attend to
more tokens of which few are left."""

SCRATCH_BYTES = 2**26
"""Of `accumulators`, if chunks of 16 tokens can do with them."""


SLOTS_OF_PART = 256
"""Fewest slots that a part of a page has: fewer would take less time than adding up the parts."""


LARGEST_HELD = tl.constexpr(8192)
"""Slots of which a scan keeps positions, too, in registers, and asks for additions ahead."""


def chunk_length(longest: int, num_tokens: int, num_reqs: int, width: int, most: int) -> int:
    """Return how many tokens of each request are processed at once: a power of 2 from 16 to `most`.

    Args:
        longest: no request has more tokens in the step.
        num_tokens, num_reqs: of the step.
        width: `PagedSlots.width`.
        most: a power of 2.
    """
    length = min(max(16, triton.next_power_of_2(longest)), most)
    while length > 16 and 4 * min(num_tokens, num_reqs * length) * (width + length) > SCRATCH_BYTES:
        length //= 2
    return length


def scan_warps(slots: int, arch: str) -> int:
    """Return the warps of a scan of so many slots: of 16,384, each of 1,024 threads has 16 in its
    64 registers."""
    threads = 1024 if slots > LARGEST_HELD else max(128, min(512, slots // 4))
    return threads // (64 if arch.startswith("gfx") else 32)


class Chunk(NamedTuple):
    """Of a request, the tokens that are processed at once."""

    page: Any
    """The offset of the request's page, in elements."""
    token: Any
    """The first one's index in the step."""
    count: Any
    before: Any
    """Tokens of the request before them."""
    row: Any
    """The first one's row of `accumulators`."""


@triton.jit
def first_row(query_start_loc, request, length):
    """Return where a request's rows of `accumulators` begin, whatever chunk it is. In no chunk
    does it have more than `length` tokens, nor more than it has in the step."""
    return tl.minimum(tl.load(query_start_loc + request), request * length)


@triton.jit
def find_request(query_start_loc, tile, num_reqs, length, QUERIES: tl.constexpr):
    """Return the request of a tile of rows: the last whose first tile is not behind it."""
    low = 0
    high = num_reqs
    while low < high:
        middle = (low + high) // 2
        row = first_row(query_start_loc, middle, length)
        if first_tile(row, middle, QUERIES) <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit
def load_chunk(
    block_table, query_start_loc, seq_lens, request, first, length, page_stride, table_stride
):
    """Return a request's tokens `first` to `first + length` of the step, as far as there are."""
    start = tl.load(query_start_loc + request)
    num_queries = tl.load(query_start_loc + request + 1) - start
    count = tl.minimum(num_queries - first, length)
    page = tl.load(block_table + request.to(tl.int64) * table_stride, mask=count > 0, other=0)
    return Chunk(
        page.to(tl.int64) * page_stride,
        (start + first).to(tl.int64),
        count,
        tl.load(seq_lens + request) - num_queries + first,
        first_row(query_start_loc, request, length).to(tl.int64),
    )


@triton.jit
def find_numbers(pages, page, PAGE: tl.constexpr):
    """Return where a page's accumulators are; its positions are `budget` further on."""
    heads: tl.constexpr = 2 * PAGE.num_kv_heads + (PAGE.selecting_head > 0)
    ends = pages + page + heads * PAGE.budget * PAGE.head_size
    return ends.to(tl.pointer_type(tl.int32))


@triton.jit
def load_vectors(base, stride, token, there, PAGE: tl.constexpr):
    """Return the keys or values `[tokens, dims]` of one head; 0 where there are none."""
    dim = tl.arange(0, PAGE.dims)
    mask = there[:, None] & (dim < PAGE.head_size)[None, :]
    return tl.load(base + token[:, None] * stride + dim[None, :], mask=mask, other=0.0)


@triton.jit(do_not_specialize=[*SIZES, "first"], do_not_specialize_on_alignment=STEP)
def select_kernel(
    query, key,  # head 0's
    pages, block_table, query_start_loc, seq_lens,
    accumulators,  # [rows, width + length] int32, written: what each query adds
    scale, num_reqs, first, length,
    query_stride, key_stride, page_stride, table_stride,
    SELECTION: tl.constexpr, PAGE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Compute head 0's selections, in fixed point. Grid: (tiles of rows, tiles of slots and of the
    chunk's tokens).

    The tile is the same for any chunk, so that a product is the same, to the bit, however a text
    is cut into chunks."""
    tile, part = tl.program_id(0), tl.program_id(1)
    request = find_request(query_start_loc, tile, num_reqs, length, ROWS)
    chunk = load_chunk(
        block_table, query_start_loc, seq_lens, request, first, length, page_stride, table_stride
    )
    row = first_row(query_start_loc, request, length)
    start = (tile - first_tile(row, request, ROWS)) * ROWS
    index, token = start + tl.arange(0, ROWS), tl.arange(0, KEYS)
    if start >= chunk.count:
        return
    slot_tiles: tl.constexpr = (PAGE.width + KEYS - 1) // KEYS
    if part < slot_tiles:
        token += part * KEYS
        column, end = token, tl.minimum(chunk.before, PAGE.budget)
        keys = pages + chunk.page + PAGE.selecting_head * PAGE.budget * PAGE.head_size
        k = load_vectors(keys, PAGE.head_size, token, token < end, PAGE)
    else:
        token += (part - slot_tiles) * KEYS
        # A token adds nothing to its own accumulator, so the last one's key is not asked for.
        column, end = PAGE.width + token, tl.minimum(start + ROWS, chunk.count) - 1
        keys = key + chunk.token * key_stride
        k = load_vectors(keys, key_stride, token, token < end, PAGE)
    if tl.min(token, 0) >= end:
        return
    queries = query + chunk.token * query_stride
    q = load_vectors(queries, query_stride, index, index < chunk.count, PAGE)
    if k.dtype != q.dtype:
        q, k = q.to(tl.float32), k.to(tl.float32)
    x = multiply(q, tl.trans(k), tl.zeros([ROWS, KEYS], tl.float32)) * scale
    units = SELECTION(x) * 65536.0
    units = tl.where(units < 4194304.0, tl.floor(units + 0.5), units)  # beyond, it is whole
    whole = tl.minimum(units, 2147483520.0).to(tl.int32)  # the largest float32 below 2^31
    whole = tl.where(units > 2147483520.0, LARGEST, whole)
    places = (chunk.row + index)[:, None] * (PAGE.width + length) + column[None, :]
    mask = (index < chunk.count)[:, None] & (token < end)[None, :]
    tl.store(accumulators + places, whole, mask=mask)


@triton.jit
def largest_rank(state, position):
    """Return the rank of the token that is evicted next: accumulators in the upper 32 bits, before
    ages."""
    return tl.max((state.to(tl.int64) << 32) + (-position + LARGEST), 0)


@triton.jit
def has_rank(state, position, rank):
    """Return which tokens have this rank; no two have the same."""
    return (state == (rank >> 32).to(tl.int32)) & (-position + LARGEST == rank.to(tl.int32))


@triton.jit
def found(state):
    """Return the accumulators of tokens that are there, of others -1."""
    return tl.where(state == FIRST, 0, tl.maximum(state, -1))


@triton.jit
def replacement(state):
    """Return the rows of the tokens that have replaced others, negative where none has. (Of the
    largest accumulators the difference would be beyond 32 bits.)"""
    return tl.where(state < ABSENT, ABSENT - 1 - tl.minimum(state, ABSENT), -1)


@triton.jit
def add(state, units):
    """Return accumulators after an addition; they stop at LARGEST."""
    return tl.where(state < 0, state, state + tl.minimum(units, -state + LARGEST))


@triton.jit(do_not_specialize=[*SIZES[1:], "first"], do_not_specialize_on_alignment=STEP)
def scan_kernel(
    pages, block_table, query_start_loc, seq_lens,
    accumulators,  # [rows, width + length] int32: what each query adds, then what it finds
    moves,  # [rows, 2] int32, written: whom each token replaced, and its accumulator at the end
    deaths,  # [num_reqs, width] int32, for use in here: the row of what replaced a slot's token
    first, length, page_stride, table_stride,
    PAGE: tl.constexpr, OWN: tl.constexpr, PIECE: tl.constexpr,
):  # fmt: skip
    """Go through a chunk's tokens, at most OWN: evict, insert, and add. Grid: (num_reqs,).

    The chunk's own tokens are kept apart from those in the slots, so that nothing is looked up by
    its slot: a token that replaces another leaves in `moves` the slot, or -1 - i if that was the
    chunk's token i."""
    request = tl.program_id(0)
    chunk = load_chunk(
        block_table, query_start_loc, seq_lens, request, first, length, page_stride, table_stride
    )
    if chunk.count <= 0:
        return
    numbers = find_numbers(pages, chunk.page, PAGE)
    slot, own = tl.arange(0, PAGE.slots), tl.arange(0, OWN)
    inside, taken = slot < PAGE.width, slot < tl.minimum(chunk.before, PAGE.budget)
    position = tl.load(numbers + PAGE.budget + slot, mask=taken, other=0)
    state = tl.load(numbers + slot, mask=taken, other=ABSENT)
    state = tl.where(taken & (position == 0), FIRST, state)
    own_state, own_position = own * 0 + ABSENT, chunk.before + own
    for i in range(0, chunk.count):
        newest = chunk.row + i
        row = accumulators + newest * (PAGE.width + length)
        # What has not been written is not added either: those tokens are not there.
        if PAGE.slots <= LARGEST_HELD:
            units = tl.load(row + slot, mask=inside, other=0)
        own_units = tl.load(row + PAGE.width + own, mask=own < length, other=0)
        place = chunk.before + i
        if place >= PAGE.budget:
            if PAGE.slots <= LARGEST_HELD:
                age = position
            else:
                in_page = slot < PAGE.budget
                age = tl.load(numbers + PAGE.budget + slot, mask=in_page, other=0)
            rank = largest_rank(own_state, own_position)
            rank = tl.maximum(rank, largest_rank(state, age))
            dead = (-newest + (ABSENT - 1)).to(tl.int32)
            state = tl.where(has_rank(state, age, rank), dead, state)
            own_state = tl.where(has_rank(own_state, own_position, rank), dead, own_state)
        if PAGE.slots > LARGEST_HELD:
            units = tl.load(row + slot, mask=inside, other=0)
        tl.store(row + slot, found(state), mask=inside)
        own_found = tl.where(own == i, 0, found(own_state))
        tl.store(row + PAGE.width + own, own_found, mask=own < length)
        state, own_state = add(state, units), add(own_state, own_units)
        own_state = tl.where(own == i, tl.where(place == 0, FIRST, 0), own_state)

    # Asked for again: the addresses would take registers in the loop.
    page = tl.load(block_table + request.to(tl.int64) * table_stride).to(tl.int64) * page_stride
    tl.store(find_numbers(pages, page, PAGE) + slot, state, mask=state >= 0)
    there, place = own < chunk.count, chunk.before + own
    own_moves = moves + 2 * (chunk.row + own)
    tl.store(own_moves + 1, found(own_state), mask=there)
    tl.store(own_moves, place, mask=there & (place < PAGE.budget))
    newer = replacement(own_state)
    tl.store(moves + 2 * newer, -1 - own, mask=there & (newer >= 0))
    # The same of the slots, through memory: in a scatter each thread wants slots of its own.
    deaths += request.to(tl.int64) * PAGE.width
    tl.store(deaths + slot, replacement(state), mask=inside)
    tl.debug_barrier()
    for start in range(0, tl.minimum(chunk.before, PAGE.budget), PIECE):
        few = start + tl.arange(0, PIECE)
        newer_row = tl.load(deaths + few, mask=few < PAGE.width, other=-1)
        tl.store(moves + 2 * newer_row, few, mask=newer_row >= 0)


@triton.jit
def store_token(
    key, value, selecting, pages, moves, chunk, index, place, kv_head,
    key_stride, value_stride, selecting_stride,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Put one head of a chunk's token into a slot; with KV head 0's go the token's accumulator and
    position, and head 0's key where that is another rank's."""
    token, dim = chunk.token + index, tl.arange(0, PAGE.dims)
    mask = dim < PAGE.head_size
    k = tl.load(key + token * key_stride + kv_head * PAGE.head_size + dim, mask=mask)
    v = tl.load(value + token * value_stride + kv_head * PAGE.head_size + dim, mask=mask)
    target = pages + chunk.page + (kv_head * PAGE.budget + place) * PAGE.head_size + dim
    tl.store(target, k, mask=mask)
    tl.store(target + PAGE.num_kv_heads * PAGE.budget * PAGE.head_size, v, mask=mask)
    if kv_head == 0:
        numbers = find_numbers(pages, chunk.page, PAGE) + place
        tl.store(numbers, tl.load(moves + 2 * (chunk.row + index) + 1))
        tl.store(numbers + PAGE.budget, chunk.before + index)
        if PAGE.selecting_head > 0:
            k = tl.load(selecting + token * selecting_stride + dim, mask=mask)
            target += PAGE.selecting_head * PAGE.budget * PAGE.head_size
            tl.store(target, k, mask=mask)


@triton.jit
def attend_tokens(
    q, k, v, accumulators, valid, running_max, denominator, output, factor, known,
    UPDATE: tl.constexpr, PARAMS: tl.constexpr,
):  # fmt: skip
    """Go on with keys and values `[KEYS, dims]`, of which each row finds those with accumulators
    `[ROWS or 1, KEYS]` of at least 0."""
    s = multiply(q, tl.trans(k.to(q.dtype)), tl.zeros([q.shape[0], k.shape[0]], tl.float32))
    s = s * factor[:, None] - accumulators.to(tl.float32) * (LOG2E / 65536.0)
    seen = (accumulators >= 0) & valid[:, None]
    one = factor * 0.0 + 1.0
    weights, rescale, running_max, denominator = UPDATE(
        s, seen, running_max, denominator, one, one, known, PARAMS
    )
    output = multiply(weights.to(q.dtype), v.to(q.dtype), output * rescale[:, None])
    return running_max, denominator, output


@triton.jit(do_not_specialize=[*SIZES, "first"], do_not_specialize_on_alignment=STEP)
def attend_kernel(
    out, query, key, value,
    selecting,  # head 0's keys, where PAGE has a head for them
    pages, block_table, query_start_loc, seq_lens, accumulators, moves,
    part_rows, part_outputs,  # as those of `attention.attend_kernel`
    scale, num_reqs, first, length,
    query_stride, key_stride, value_stride, selecting_stride, out_stride,
    page_stride, table_stride,
    QUERY_FACTOR: tl.constexpr, UPDATE: tl.constexpr, EPILOGUE: tl.constexpr,
    PARAMS: tl.constexpr, VARIANT: tl.constexpr, PAGE: tl.constexpr,
    ROWS: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, STORE: tl.constexpr,
    SPLITS: tl.constexpr,
):  # fmt: skip
    """Attend with all query heads of a KV head to what the scan says they find; with STORE no
    request has another query, and it is stored. Grid: (tiles of QUERIES, num_kv_heads, SPLITS)."""
    tile, kv_head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    request = find_request(query_start_loc, tile, num_reqs, length, QUERIES)
    chunk = load_chunk(
        block_table, query_start_loc, seq_lens, request, first, length, page_stride, table_stride
    )
    start_row = first_row(query_start_loc, request, length)
    start = (tile - first_tile(start_row, request, QUERIES)) * QUERIES
    if start >= chunk.count:
        return
    row, dim = tl.arange(0, ROWS), tl.arange(0, PAGE.dims)
    index, head = start + row // PAGE.group, kv_head * PAGE.group + row % PAGE.group
    valid = (row < QUERIES * PAGE.group) & (index < chunk.count)
    row_mask = valid[:, None] & (dim < PAGE.head_size)[None, :]
    column = head[:, None] * PAGE.head_size + dim[None, :]
    token = chunk.token + index
    q = tl.load(query + token[:, None] * query_stride + column, mask=row_mask, other=0.0)
    one = tl.zeros([ROWS], tl.float32) + 1.0
    position = chunk.before + index
    n = tl.minimum(position + 1, PAGE.budget).to(tl.float32)
    norm = tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1))
    known = Query(head, position, n, norm, one, one)
    factor = QUERY_FACTOR(known, scale, PAGE.head_size, PARAMS)
    running_max, denominator = one * 0.0 + VARIANT.first_max, one * 0.0
    output = tl.full([ROWS, PAGE.dims], 0.0, tl.float32)

    width = PAGE.width + length
    row_index = tl.full([1], start, tl.int32) if QUERIES == 1 else index  # of all heads the same
    rows = accumulators + ((chunk.row + row_index) * width)[:, None]
    inside = (row_index < chunk.count)[:, None]
    stored, end = tl.minimum(chunk.before, PAGE.budget), tl.minimum(start + QUERIES, chunk.count)
    low, high = 0, stored
    slots_each: tl.constexpr = (PAGE.budget + SPLITS * KEYS - 1) // (SPLITS * KEYS) * KEYS
    if SPLITS > 1:  # the chunk's own token is in the first part
        low, high = split * slots_each, tl.minimum(stored, (split + 1) * slots_each)
        end = tl.where(split == 0, end, 0)
    keys = pages + chunk.page + kv_head * PAGE.budget * PAGE.head_size
    values = keys + PAGE.num_kv_heads * PAGE.budget * PAGE.head_size
    for begin in range(low, high, KEYS):
        slot = begin + tl.arange(0, KEYS)
        there = slot < stored
        found = tl.load(rows + slot[None, :], mask=inside & there[None, :], other=-1)
        k = load_vectors(keys, PAGE.head_size, slot, there, PAGE)
        v = load_vectors(values, PAGE.head_size, slot, there, PAGE)
        running_max, denominator, output = attend_tokens(
            q, k, v, found, valid, running_max, denominator, output, factor, known, UPDATE, PARAMS
        )
    own_keys = key + chunk.token * key_stride + kv_head * PAGE.head_size
    own_values = value + chunk.token * value_stride + kv_head * PAGE.head_size
    for begin in range(0, end, KEYS):
        own = begin + tl.arange(0, KEYS)
        there = own < end
        found = tl.load(rows + PAGE.width + own[None, :], mask=inside & there[None, :], other=-1)
        k = load_vectors(own_keys, key_stride, own, there, PAGE)
        v = load_vectors(own_values, value_stride, own, there, PAGE)
        running_max, denominator, output = attend_tokens(
            q, k, v, found, valid, running_max, denominator, output, factor, known, UPDATE, PARAMS
        )
    if SPLITS > 1:
        part = (token * (PAGE.num_kv_heads * PAGE.group) + head) * SPLITS + split
        tl.store(part_rows + 2 * part, running_max, mask=valid)
        tl.store(part_rows + 2 * part + 1, denominator, mask=valid)
        result = part_outputs + part[:, None] * PAGE.head_size + dim[None, :]
        tl.store(result, output, mask=row_mask)
    else:
        output *= EPILOGUE(running_max, denominator, known, PARAMS)[:, None]
        result = out + token[:, None] * out_stride + column
        tl.store(result, output.to(out.dtype.element_ty), mask=row_mask)
    if STORE:
        place = tl.load(moves + 2 * chunk.row)
        if place // slots_each == split:  # nobody else reads there
            store_token(
                key, value, selecting, pages, moves, chunk, start, place,
                kv_head, key_stride, value_stride, selecting_stride, PAGE,
            )  # fmt: skip


@triton.jit(do_not_specialize=[*SIZES, "first"], do_not_specialize_on_alignment=STEP)
def store_kernel(
    key, value, selecting, pages, block_table, query_start_loc, seq_lens, moves,
    num_reqs, first, length,
    key_stride, value_stride, selecting_stride, page_stride, table_stride,
    PAGE: tl.constexpr,
):  # fmt: skip
    """Store a chunk's token if it is left at the end of it. Grid: (rows, num_kv_heads)."""
    row, kv_head = tl.program_id(0), tl.program_id(1)
    request = find_request(query_start_loc, row, num_reqs, length, 1)
    chunk = load_chunk(
        block_table, query_start_loc, seq_lens, request, first, length, page_stride, table_stride
    )
    index = row - first_row(query_start_loc, request, length)
    if index >= chunk.count:
        return
    if tl.load(moves + 2 * row + 1) < 0:
        return
    place = tl.load(moves + 2 * row)
    while place < 0:  # it replaced one that had replaced another
        place = tl.load(moves + 2 * (chunk.row - 1 - place))
    store_token(
        key, value, selecting, pages, moves, chunk, index, place, kv_head,
        key_stride, value_stride, selecting_stride, PAGE,
    )  # fmt: skip
