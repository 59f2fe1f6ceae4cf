"""Attention of whole sequences, for training: what its kernels (`forward.py`, `backward.py`,
`selecting.py`) share.

A program has ROWS queries of one head and walks the keys that they see, KEYS at a time, or the
other way round. Each query sees one interval of keys, so that causal masks, sliding windows,
padding and packed sequences are all the same to the kernels: tiles that every query of the program
sees whole come first, without a mask, then those at the edges.

Scores become weights by the variant's own functions, as in serving (`attention.py`). `rows`
`[3, batch, num_tokens]` int32 has the first key that each query sees, the one after the last, and
the query's position. Pointers into queries, keys and values have a stride for each of batch, head
and token; what is `[batch, num_heads, num_tokens]` float32 has none. VARIANT is
`variant.Constants`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attn_kernels.triton.attention import LOG2E
from attn_kernels.triton.cache import multiply
from attn_kernels.triton.variant import Query

FAR = tl.constexpr(2**30)

SIZES = ("batch_size", "num_tokens")
"""Arguments of kernels that are compiled once for all values."""


class Shape(NamedTuple):
    """Heads, as compile-time arguments."""

    num_heads: int
    group: int
    """Query heads of a KV head."""
    head_size: int
    dims: int
    """`head_size` rounded up to a power of two, 16 at least."""


class Tiling(NamedTuple):
    """How a call is cut up, as compile-time arguments."""

    rows: int
    keys: int


class Strides(NamedTuple):
    """Elements between batches, heads and tokens of a tensor; its head dimension is contiguous."""

    batch: Any
    head: Any
    token: Any


class Keys(NamedTuple):
    """Keys and values of one KV head of one sequence: pointers, and strides between tokens."""

    k: Any
    v: Any
    k_stride: Any
    v_stride: Any
    units: Any
    """1 / |k| of each key, `[num_tokens]`."""


class Selector(NamedTuple):
    """What a stateful variant's penalties come from: pointers, and strides between tokens."""

    q: Any
    """Head 0's queries."""
    k: Any
    q_stride: Any
    k_stride: Any
    rows: Any
    """`rows` of the sequence."""
    plane: Any
    snapshots: Any
    """`[tiles of queries, num_tokens]` float32: accumulators ahead of each tile."""


class Tile(NamedTuple):
    """A tile of query rows: `q` `[R, dims]`, all others `[R]`."""

    q: Any
    index: Any
    begin: Any
    end: Any
    inside: Any
    factor: Any
    """What q.k is multiplied with, see `query_factor`."""
    sums: Any
    rests: Any
    """Of the gates up to the last key that each row sees, of a gated variant."""
    decays: Any
    """Pointer to the sums of the gates up to each key, of the rows' head; their rests are `plane`
    behind them."""
    plane: Any


class Range(NamedTuple):
    """Tiles of an axis: [low, high) are those to visit, [inner, outer) those without a mask."""

    low: Any
    inner: Any
    outer: Any
    high: Any


@triton.jit
def load_tile(base, index, stride, num_tokens, SHAPE: tl.constexpr, MASKED: tl.constexpr):
    """Return `[len(index), dims]` of one head, 0 where there is nothing."""
    dim = tl.arange(0, SHAPE.dims)
    at = base + index[:, None] * stride + dim[None, :]
    if MASKED or SHAPE.dims != SHAPE.head_size:
        mask = (index < num_tokens)[:, None] & (dim < SHAPE.head_size)[None, :]
        return tl.load(at, mask=mask, other=0.0)
    return tl.load(at)


@triton.jit
def store_tile(base, index, stride, num_tokens, values, SHAPE: tl.constexpr):
    """Store `[len(index), dims]` of one head."""
    dim = tl.arange(0, SHAPE.dims)
    mask = (index < num_tokens)[:, None] & (dim < SHAPE.head_size)[None, :]
    at = base + index[:, None] * stride + dim[None, :]
    tl.store(at, values.to(base.dtype.element_ty), mask=mask)


@triton.jit
def load_decays(decays, plane, index, inside):
    """Return sums and rests of gates (`Tile`)."""
    sums = tl.load(decays + index, mask=inside, other=0.0)
    return sums, tl.load(decays + plane + index, mask=inside, other=0.0)


@triton.jit
def row_tile(
    q, index, begin, end, inside, factor, decays, place, plane, VARIANT: tl.constexpr
):  # fmt: skip
    """Return the `Tile` of rows of one head, whose first is at `place` in a plane of `decays`."""
    if VARIANT.gated:
        sums, rests = load_decays(decays + place, plane, index, inside)
        of_keys = decays + 2 * plane + place
    else:
        sums, rests, of_keys = factor, factor, factor  # nobody looks
    return Tile(q, index, begin, end, inside, factor, sums, rests, of_keys, plane)


@triton.jit
def describe(
    q, index, rows, plane, head, num_tokens, scale, first_learned, second_learned, decays, place,
    wide_plane,
    QUERY_FACTOR: tl.constexpr, PARAMS: tl.constexpr, VARIANT: tl.constexpr, SHAPE: tl.constexpr,
):  # fmt: skip
    """Return the `Tile` of queries `q` and the `Query` that the variant's functions get."""
    inside = index < num_tokens
    begin = tl.load(rows + index, mask=inside, other=0)
    end = tl.load(rows + plane + index, mask=inside, other=0)
    position = tl.load(rows + 2 * plane + index, mask=inside, other=0)
    n = tl.maximum(end - begin, 1).to(tl.float32)  # empty rows, too, need finite factors
    norm = tl.sqrt(tl.sum(q.to(tl.float32) * q.to(tl.float32), 1))
    first, second = n * 0.0 + 1.0, n * 0.0 + 1.0
    if VARIANT.num_learned > 0:
        first *= tl.load(first_learned + head)
    if VARIANT.num_learned > 1:
        second *= tl.load(second_learned + head)
    known = Query(index * 0 + head, position, n, norm, first, second)
    factor = QUERY_FACTOR(known, scale, SHAPE.head_size, PARAMS)
    tile = row_tile(
        q, index, begin, end, inside, factor, decays, place, wide_plane, VARIANT
    )  # fmt: skip
    return tile, known


@triton.jit
def keys_of(
    k, v, units, batch, kv_head, num_tokens, k_strides, v_strides, SHAPE: tl.constexpr
):  # fmt: skip
    """Return the `Keys` of a KV head."""
    k += batch * k_strides.batch + kv_head.to(tl.int64) * k_strides.head
    v += batch * v_strides.batch + kv_head.to(tl.int64) * v_strides.head
    if units is None:
        units = k  # nobody looks: a tuple holds no None in Triton 3.6
    else:
        units += (batch * (SHAPE.num_heads // SHAPE.group) + kv_head) * num_tokens
    return Keys(k, v, k_strides.token, v_strides.token, units)


@triton.jit
def selector_of(
    q, k, rows, snapshots, batch, num_tokens, plane, q_strides, k_strides, ROWS: tl.constexpr
):  # fmt: skip
    """Return the `Selector` of a sequence; `rows` are the sequence's."""
    if snapshots is None:
        snapshots = rows
    else:
        snapshots += batch * tl.cdiv(num_tokens, ROWS) * num_tokens
    q += batch * q_strides.batch
    k += batch * k_strides.batch
    return Selector(q, k, q_strides.token, k_strides.token, rows, plane, snapshots)


@triton.jit
def range_of(low, high, inner, outer, SIZE: tl.constexpr):
    """Return the tiles of `SIZE` that have something in [low, high), and of these the ones that
    lie in [inner, outer)."""
    high = tl.maximum(high, 0)
    low = tl.minimum(low, high) // SIZE * SIZE
    inner = tl.cdiv(inner, SIZE) * SIZE
    outer = outer // SIZE * SIZE
    none = outer <= inner
    return Range(low, tl.where(none, low, inner), tl.where(none, low, outer), high)


@triton.jit
def edges(found, SIZE: tl.constexpr):
    """Return how many tiles are at the edges."""
    return (found.inner - found.low) // SIZE + tl.cdiv(found.high - found.outer, SIZE)


@triton.jit
def edge(found, number, SIZE: tl.constexpr):
    """Return where one of them begins."""
    before = (found.inner - found.low) // SIZE
    left, right = found.low + number * SIZE, found.outer + (number - before) * SIZE
    return tl.where(number < before, left, right)


@triton.jit
def seen_keys(tile, KEYS: tl.constexpr):
    """Return the `Range` of keys that a tile of queries sees."""
    some = tile.inside & (tile.end > tile.begin)
    return range_of(
        tl.min(tl.where(some, tile.begin, FAR), 0),
        tl.max(tl.where(some, tile.end, 0), 0),
        tl.max(tl.where(tile.inside, tile.begin, 0), 0),
        tl.min(tl.where(tile.inside, tile.end, FAR), 0),
        KEYS,
    )


@triton.jit
def seeing_queries(rows, plane, first_key, num_tokens, ROWS: tl.constexpr, KEYS: tl.constexpr):
    """Return the `Range` of queries that see a tile of keys."""
    low, high, inner, outer, count = FAR + 0, 0, FAR + 0, 0, 0
    for start in range(0, num_tokens, 1024):
        index = start + tl.arange(0, 1024)
        inside = index < num_tokens
        begin = tl.load(rows + index, mask=inside, other=FAR)
        end = tl.load(rows + plane + index, mask=inside, other=0)
        some = (begin < first_key + KEYS) & (end > first_key) & (end > begin)
        low = tl.minimum(low, tl.min(tl.where(some, index, FAR), 0))
        high = tl.maximum(high, tl.max(tl.where(some, index + 1, 0), 0))
        whole = (begin <= first_key) & (end >= first_key + KEYS)
        inner = tl.minimum(inner, tl.min(tl.where(whole, index, FAR), 0))
        outer = tl.maximum(outer, tl.max(tl.where(whole, index + 1, 0), 0))
        count += tl.sum(whole.to(tl.int32), 0)
    outer = tl.where(count == outer - inner, outer, 0)  # else there are gaps
    return range_of(low, high, inner, outer, ROWS)


@triton.jit
def of_rows(x, BY_KEYS: tl.constexpr):
    """Return rows' numbers as they broadcast to `[rows, keys]`, or BY_KEYS to `[keys, rows]`."""
    return x[None, :] if BY_KEYS else x[:, None]


@triton.jit
def of_keys(x, BY_KEYS: tl.constexpr):
    """Return keys' numbers as they broadcast likewise."""
    return x[:, None] if BY_KEYS else x[None, :]


@triton.jit
def seen_by(
    tile, key, BY_KEYS: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr, MASKED: tl.constexpr
):  # fmt: skip
    """Return which keys each row sees."""
    if MASKED:
        key = of_keys(key, BY_KEYS)
        return (key >= of_rows(tile.begin, BY_KEYS)) & (key < of_rows(tile.end, BY_KEYS))
    return tl.full([KEYS, ROWS] if BY_KEYS else [ROWS, KEYS], 1, tl.int1)


@triton.jit
def selected(
    tile, selector, key, scale, num_tokens,
    SHAPE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Return head 0's raw scores, and which of them a stateful variant's accumulators take: not
    those of a query that does not see itself, of a query's own key, or of a sequence's first key,
    which sees itself alone."""
    q = load_tile(selector.q, tile.index, selector.q_stride, num_tokens, SHAPE, True)
    k = load_tile(selector.k, key, selector.k_stride, num_tokens, SHAPE, True)
    x = multiply(q, tl.trans(k), tl.full([ROWS, KEYS], 0.0, tl.float32)) * scale
    inside = key < num_tokens
    begin = tl.load(selector.rows + key, mask=inside, other=0)
    end = tl.load(selector.rows + selector.plane + key, mask=inside, other=0)
    own = (tile.begin <= tile.index) & (tile.index < tile.end)
    chosen = seen_by(tile, key, False, ROWS, KEYS, True) & own[:, None]
    chosen &= (key[None, :] < tile.index[:, None]) & (end - begin > 1)[None, :]
    return x, chosen


@triton.jit
def penalties(
    tile, selector, key, scale, num_tokens,
    SELECTION: tl.constexpr, SHAPE: tl.constexpr, ROWS: tl.constexpr, KEYS: tl.constexpr,
):  # fmt: skip
    """Return what is subtracted from the scores: accumulators ahead of the tile, and what its own
    queries before each row's add."""
    x, chosen = selected(tile, selector, key, scale, num_tokens, SHAPE, ROWS, KEYS)
    added = tl.where(chosen, SELECTION(x), 0.0)
    first = (tl.min(tile.index, 0) // ROWS).to(tl.int64) * num_tokens
    ahead = tl.load(selector.snapshots + first + key, mask=key < num_tokens, other=0.0)
    return ahead[None, :] + tl.cumsum(added, 0) - added


@triton.jit
def scores_of(
    tile, known, k, keys, selector, key, scale, num_tokens,
    SCORE_BIAS: tl.constexpr, SELECTION: tl.constexpr, PARAMS: tl.constexpr,
    VARIANT: tl.constexpr, SHAPE: tl.constexpr, BY_KEYS: tl.constexpr, ROWS: tl.constexpr,
    KEYS: tl.constexpr,
):  # fmt: skip
    """Return the scores of queries against keys `k` `[keys, dims]`, in units of log2(e), `[rows,
    keys]` or BY_KEYS `[keys, rows]`."""
    if BY_KEYS:
        s = multiply(k, tl.trans(tile.q), tl.full([KEYS, ROWS], 0.0, tl.float32))
    else:
        s = multiply(tile.q, tl.trans(k), tl.full([ROWS, KEYS], 0.0, tl.float32))
    s *= of_rows(tile.factor, BY_KEYS)
    if VARIANT.unit_keys:
        s *= of_keys(tl.load(keys.units + key, mask=key < num_tokens, other=0.0), BY_KEYS)
    if SCORE_BIAS is not None:
        distance = ((tile.end - 1)[:, None] - key[None, :]).to(tl.float32)
        if VARIANT.gated:
            sums, rests = load_decays(tile.decays, tile.plane, key, key < num_tokens)
            decay = (tile.sums[:, None] - sums[None, :]) + (tile.rests[:, None] - rests[None, :])
            bias = SCORE_BIAS(known, distance, decay, PARAMS)
        else:
            bias = SCORE_BIAS(known, distance, PARAMS)
        s += tl.trans(bias) if BY_KEYS else bias
    if SELECTION is not None:
        penalty = LOG2E * penalties(
            tile, selector, key, scale, num_tokens, SELECTION, SHAPE, ROWS, KEYS
        )  # fmt: skip
        s -= tl.trans(penalty) if BY_KEYS else penalty
    return s
