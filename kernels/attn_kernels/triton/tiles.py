"""How attention is cut up: tiles of queries, and what is fixed when kernels are compiled."""

from typing import NamedTuple

import triton
import triton.language as tl

SIZES = ["num_reqs", "table_stride"]
STEP = ["block_table", "query_start_loc", "seq_lens"]
"""What differs from step to step, or is a part of a longer tensor: no other kernels are compiled
for numbers and addresses that 16 divides."""


class Shape(NamedTuple):
    """A layer and its cache, as compile-time arguments."""

    num_kv_heads: int
    group: int
    """Query heads of a KV head."""
    head_size: int
    dims: int
    """`head_size` rounded up to a power of two."""
    block_size: int
    window: int
    """0: none."""
    soft_cap: float
    """0: none."""
    alibi: bool
    """With a slope a head."""
    quantized: bool
    """With a scale for all keys, and one for all values."""
    kv_bits: int
    """Bits of keys and values that are quantized with parameters of each token; 0: none."""
    selecting_head: int
    """The KV head in the cache with head 0's keys: one behind the others where head 0 is another
    rank's."""


class Tiling(NamedTuple):
    """How a call is cut up, as compile-time arguments."""

    decode: bool
    """Each request has one query only."""
    rows: int
    queries: int
    selectors: int
    """`queries` rounded up to a power of two, 16 at least (a tensor core's)."""
    keys: int
    splits: int
    keeps_scores: bool
    """The pass for statistics leaves its scores for the other."""


@triton.jit
def first_tile(start_loc, request, QUERIES: tl.constexpr):
    """Return the number of a request's first tile. Its last one may be short: this leaves room for
    that, so that no request reaches the next one's."""
    return start_loc // QUERIES + request if QUERIES > 1 else start_loc


@triton.jit
def find_request(query_start_loc, tile, num_reqs, QUERIES: tl.constexpr):
    """Return the request of a tile: the last whose first tile is not behind it."""
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
def visible(position, key, WINDOW: tl.constexpr):
    """Return which keys each row sees, `[rows, keys]`."""
    distance = position[:, None] - key[None, :]
    seen = distance >= 0
    return seen & (distance < WINDOW) if WINDOW else seen
