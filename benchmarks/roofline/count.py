"""What a call of the Triton kernels loads, stores and computes, counted along their own loops.

`attend_kernel`, `merge_kernel` and `select_kernel` (attn_kernels/triton) are followed here tile by
tile; the variant's functions are traced (`trace.py`). Address arithmetic is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from attn_kernels import Variant
from attn_kernels.triton import attention, functions
from attn_kernels.triton.tuning import DECODE, PREFILL, Tile, parts_for, tile_for
from benchmarks.kernels.case import DTYPES, Case
from benchmarks.roofline.trace import Tally, Traced, traceable


@dataclass(frozen=True)
class Stream:
    """Bytes of one kind.

    Attributes:
        first: they come from, or go to, memory in any case.
        again: of these or others that were touched before.
        between: bytes touched between two uses: if the cache is larger, `again` is found there.
    """

    first: float
    again: float = 0.0
    between: float = 0.0


@dataclass
class Counts:
    """One call.

    Attributes:
        parts: into how many each context is cut.
        tile: rows and keys of a program.
        streams: bytes, by name.
        flops: of the matrix products, on whole tiles as the hardware computes them.
        ops: all else, on whole tiles.
    """

    parts: int
    tile: Tile
    streams: dict[str, Stream] = field(default_factory=dict)
    flops: int = 0
    ops: Tally = field(default_factory=Tally)

    @property
    def loop_bytes(self) -> float:
        """All that is loaded and stored."""
        return sum(stream.first + stream.again for stream in self.streams.values())

    def memory_bytes(self, cache: float) -> float:
        """What of that a cache of this size does not hold."""
        return sum(
            stream.first + (stream.again if stream.between > cache else 0.0)
            for stream in self.streams.values()
        )


@dataclass(frozen=True)
class Program:
    """What one program of `attend_kernel` computes; shapes as there."""

    variant: Variant
    functions: dict[str, Any]
    tile: Tile
    dims: int
    group_keys: bool
    """There are several queries in a tile."""
    cast_queries: bool
    """Weights are rounded to the queries' format."""
    cast_cache: bool

    def _traced(self, name: str) -> Any:
        return traceable(self.functions[name])

    def scores(self, tally: Tally) -> tuple[Traced, Traced]:
        """Scores and visibility of a tile of keys, before penalties."""
        rows, keys = self.tile.rows, self.tile.keys
        k = Traced(tally, (self.dims, keys))
        if self.cast_cache:
            k = k.to(None)
        s = Traced(tally, (rows, keys)) * Traced(tally, (rows, 1))
        if self.functions["UNIT_KEYS"]:
            s = s * traceable(attention.unit)(k)[None, :]
        position, key = Traced(tally, (rows,)), Traced(tally, (keys,))
        seen = traceable(attention.visible)(position, key, 0)
        return s, seen & Traced(tally, (1, keys))

    def observe(self) -> Tally:
        """A step of the first of two passes."""
        tally = Tally()
        s, seen = self.scores(tally)
        row = Traced(tally, (self.tile.rows,))
        self._traced("OBSERVE_TILE")(s, seen, row, row)
        return tally

    def weigh(self) -> Tally:
        """A step of the pass that sums up values."""
        tally = Tally()
        rows, keys = self.tile.rows, self.tile.keys
        s, seen = self.scores(tally)
        row = Traced(tally, (rows,))
        if self.variant.stateful:
            penalty = Traced(tally, (1, keys))
            if self.group_keys:
                if self.cast_cache:
                    Traced(tally, (self.dims, keys)).to(None)
                position, key = Traced(tally, (rows,)), Traced(tally, (keys,))
                x = Traced(tally, (rows, keys)) * 1.0
                valid = Traced(tally, (rows, 1))
                added = traceable(attention.selections)(x, seen & valid, position, key)
                once = Traced(tally, (rows, keys))._with(added)  # the group's first head
                penalty = penalty + once.to(None) - added  # `to`: the running sum
            s = s - penalty * 1.0
        weights, rescale, *_ = self._traced("WEIGH_TILE")(
            s, seen, row, row, row, row, self.functions["PARAMS"]
        )
        if self.cast_queries:
            weights.to(None)
        if self.cast_cache:
            Traced(tally, (keys, self.dims)).to(None)
        Traced(tally, (rows, self.dims)) * rescale[:, None]
        return tally

    def frame(self, *, settle: bool, finish: bool) -> Tally:
        """Before and after the loops."""
        tally = Tally()
        row = Traced(tally, (self.tile.rows,))
        one = Traced(tally, (self.tile.rows, 1))
        if self.functions["UNIT_KEYS"]:
            q = Traced(tally, (self.tile.rows, self.dims))
            (q * q).tally.special += self.tile.rows
        params = self.functions["PARAMS"]
        self._traced("QUERY_FACTOR")(row, row, row, row, 1.0, self.dims, params)
        if settle:
            self._traced("SETTLE")(one, one, row)
        if finish:
            factor = self._traced("FINISH")(row, row, params)
            Traced(tally, (self.tile.rows, self.dims)) * factor[:, None]
        return tally

    def merge(self, parts: int) -> Tally:
        """`merge_kernel` for one row."""
        tally = Tally()
        tops = Traced(tally, (parts,))
        factors, top, total = self._traced("MERGE")(tops, tops)
        Traced(tally, (parts, self.dims)) * factors[:, None]
        tally.scalar += self.dims * (parts - 1)
        self._traced("FINISH")(top, total, self.functions["PARAMS"])
        tally.scalar += self.dims
        return tally


def count(
    variant: Variant, case: Case, arch: str, processors: int, cache_itemsize: int | None = None
) -> Counts:
    """Counts of one call without a window.

    Args:
        variant: the attention function.
        case: its dtype is that of queries and outputs.
        arch: "sm_90", "gfx942".
        processors: of the device.
        cache_itemsize: bytes of an element of keys and values, if it is another than the queries'.

    Raises:
        UncountedError: the variant's functions do what `trace.py` does not know.
        ValueError: the variant has no Triton form.
    """
    of = functions(variant)
    item = DTYPES[case.dtype].itemsize
    stored = cache_itemsize or item
    group = case.num_heads // case.num_kv_heads
    decode = case.phase == "decode"
    tile = tile_for(DECODE if decode else PREFILL, arch, case.head_dim, item, group)
    per_tile = 1 if decode else tile.queries(group)
    heads, size, batch = case.num_kv_heads, case.head_dim, case.batch
    dims = 1 << (size - 1).bit_length()
    num_tokens = batch * case.new_tokens
    tiles = num_tokens if decode else num_tokens // per_tile + batch  # as launched
    parts = parts_for(tiles * heads, processors) if decode else 1

    # Tiles that have queries: where each ends, and how many tiles of keys that makes.
    before = case.seq_len - case.new_tokens
    firsts = range(0, case.new_tokens, per_tile)
    ends = [before + min(first + per_tile, case.new_tokens) for first in firsts]
    keys_seen = batch * sum(ends)
    steps = batch * heads * sum(-(-end // tile.keys) for end in ends)
    programs = batch * heads * len(ends) * parts
    rows = num_tokens * case.num_heads

    program = Program(variant, of, tile, dims, per_tile > 1, item < 4, stored != item)
    counts = Counts(parts, tile)
    streams = counts.streams
    two_passes = of["SETTLE"] is not None
    one_head = case.seq_len * size * stored  # of a request's keys
    loops = heads * keys_seen * size * stored
    unique = batch * heads * one_head

    # Tiles of one KV head and request run side by side, and read its keys again from the cache.
    for name in ("keys", "values"):
        streams[name] = Stream(unique, loops - unique, 2 * one_head)
    table = 4 * batch * case.seq_len
    walked = 4 * heads * keys_seen * (1 + two_passes)
    streams["block table"] = Stream(table, walked - table)
    if two_passes:
        # The second pass begins when all parts have ended the first, or the program has its own.
        running = min(unique, 2 * processors * one_head)
        streams["keys again"] = Stream(0, loops, unique if parts > 1 else running)
        counts.flops += steps * 2 * tile.rows * tile.keys * dims
        counts.ops += program.observe() * steps
    counts.flops += steps * 4 * tile.rows * tile.keys * dims
    counts.ops += program.weigh() * steps

    launches = 2 if two_passes and parts > 1 else 1
    query_bytes = rows * size * item
    streams["queries"] = Stream(query_bytes, query_bytes * (parts * launches - 1), query_bytes)
    streams["outputs"] = Stream(query_bytes)
    if variant.learned:
        streams["learned"] = Stream(0, 4 * rows * parts * launches * len(variant.learned))
    counts.ops += program.frame(settle=two_passes, finish=parts == 1) * programs
    if launches > 1:
        counts.ops += program.frame(settle=False, finish=False) * programs
    if parts > 1:
        outputs = rows * parts * size * 4
        streams["part outputs"] = Stream(outputs, outputs, outputs)
        streams["part rows"] = Stream(rows * parts * 8, rows * parts * 8)
        if two_passes:
            streams["observed"] = Stream(rows * parts * 8, rows * parts * 8 * parts)
        counts.ops += program.merge(parts) * rows
    if variant.stateful:
        _add_state(counts, program, case, per_tile, ends, stored, item)
    return counts


def _add_state(
    counts: Counts,
    program: Program,
    case: Case,
    per_tile: int,
    ends: list[int],
    stored: int,
    item: int,
) -> None:
    """Accumulators: `select_kernel`, and what `attend_kernel` adds for them."""
    tile, dims, streams = counts.tile, program.dims, counts.streams
    batch, heads, n, size = case.batch, case.num_kv_heads, case.seq_len, case.head_dim
    tiles, keys_seen = len(ends), batch * sum(ends)
    key_tiles = -(-n // tile.keys)
    head = batch * n * size * stored
    streams["keys of head 0"] = Stream(0, head, head)
    streams["accumulators"] = Stream(batch * n * 8)
    streams["block table"] = Stream(
        streams["block table"].first, streams["block table"].again + 4 * batch * n
    )
    snapshots = batch * tiles * n * 4
    streams["snapshots"] = Stream(snapshots, heads * keys_seen * 4, snapshots)
    selecting = batch * case.new_tokens * size * item
    streams["queries of head 0"] = Stream(0, selecting * key_tiles, selecting)

    rows = max(16, 1 << (per_tile - 1).bit_length())
    steps = batch * key_tiles * tiles
    counts.flops += steps * 2 * rows * tile.keys * dims
    tally = Tally()
    x = Traced(tally, (rows, tile.keys)) * 1.0
    position, key = Traced(tally, (rows,)), Traced(tally, (tile.keys,))
    seen = traceable(attention.visible)(position, key, 0)
    seen = seen & Traced(tally, (1, tile.keys)) & Traced(tally, (rows, 1))
    x = traceable(attention.selections)(x, seen, position, key)
    tally.scalar += rows * tile.keys  # their sum
    counts.ops += tally * steps
    if program.cast_cache:
        counts.ops += Tally(scalar=dims * tile.keys) * (batch * key_tiles)

    if per_tile > 1:
        group = case.num_heads // heads
        steps = batch * heads * sum(-(-end // tile.keys) for end in ends)
        counts.flops += steps * 2 * tile.rows * tile.keys * dims
        again = heads * keys_seen * size * stored if heads > 1 else 0
        streams["selecting keys"] = Stream(0, again, n * size * stored)
        streams["selecting queries"] = Stream(0, selecting * heads * group, selecting)
