"""Sizes of tiles, warps and stages for each architecture: a small table, or what is fastest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import triton

from attn_kernels.variant import Variant

TRITON, GLUON = KERNELS = ("triton", "gluon")
"""What attends: `triton/attention.py`, or `triton/hopper.py`."""

GLUON_SPILLS = 96
"""Most bytes of a thread that the latter spills: once a program and where masks are, hardly any
in the loop of full tiles. Its warps have all of a multiprocessor's registers, and no more fit."""


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut up and compiled."""

    rows: int
    """Query rows of a program: a power of two, at least 16 (a tensor core's)."""
    keys: int
    """Keys that a program multiplies at once."""
    num_warps: int = 4
    num_stages: int = 2
    kernel: str = TRITON
    """One of KERNELS."""

    def queries(self, group: int) -> int:
        """Return the queries of a tile if `group` heads share a KV head."""
        return self.rows // group

    @property
    def options(self) -> dict[str, Any]:
        """What Triton is given to compile it."""
        warps, stages = self.num_warps, self.num_stages
        return {"enable_fp_fusion": True, "num_warps": warps, "num_stages": stages}


DECODE, PREFILL = "decode", "prefill"

BLOCK_SIZE = 64
"""Tokens of a block of a server's cache where nobody says otherwise: a tile of 64 keys is in one,
and one of 128 in two, so that its addresses are cheap."""

SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes that a program may have, by architecture (CUDA's and ROCm's documentation)."""


PLAIN, WIDE, STATEFUL, GATED = "plain", "wide", "stateful", "gated"
"""What takes registers beside the scores: nothing, the keys' lengths (or statistics of all scores),
accumulators, gates."""

PREFILL_TILES = {
    PLAIN: {
        "sm_80": ("128x64:8:3 64x64:4:3", "128x32:8:3 32x64:4:3", "32x32:4:2 32x32:4:2"),
        "sm_90": ("128x128:8:2 64x64:4:3", "128x128:8:2 64x64:4:3", "128x32:8:2 64x32:4:2"),
        "sm_100": ("128x128:8:2 64x64:4:3", "128x128:8:2 64x64:4:3", "128x32:8:2 64x32:4:2"),
        "gfx": ("64x64:4:1 64x64:4:1", "64x64:4:1 64x64:4:1", "32x32:4:1 32x32:4:1"),
    },
    WIDE: {
        "sm_80": ("128x64:8:3 64x64:4:3", "128x32:8:3 32x64:4:3", "32x32:8:2 32x32:8:2"),
        "sm_90": ("128x128:8:2 64x64:4:3", "128x64:8:3 64x64:4:3", "128x32:8:2 64x32:4:2"),
        "sm_100": ("128x64:8:2 64x64:4:3", "128x64:8:2 64x64:4:3", "128x32:8:2 64x32:4:2"),
        "gfx": ("64x64:4:1 64x64:4:1", "64x64:4:1 64x64:4:1", "32x32:4:1 32x32:4:1"),
    },
    STATEFUL: {
        "sm_80": ("64x64:4:3 64x64:4:3", "32x32:4:3 32x32:4:3", "32x32:4:2 32x32:4:2"),
        "sm_90": ("64x64:4:3 64x64:4:3", "128x64:8:3 64x64:4:3", "64x32:4:2 64x32:4:2"),
        "sm_100": ("128x64:8:2 64x64:4:3", "128x64:8:2 64x64:4:3", "64x32:4:2 64x32:4:2"),
        "gfx": ("64x64:4:1 64x64:4:1", "64x64:4:1 64x64:4:1", "32x32:4:1 32x32:4:1"),
    },
    GATED: {
        "sm_80": ("128x64:8:2 64x64:4:2", "128x32:8:2 32x64:4:2", "32x32:8:2 32x32:8:2"),
        "sm_90": ("128x64:8:2 64x64:4:2", "128x64:8:2 64x64:4:2", "128x32:8:2 64x32:4:2"),
        "sm_100": ("128x64:8:2 64x64:4:2", "128x64:8:2 64x64:4:2", "128x32:8:2 64x32:4:2"),
        "gfx": ("64x64:4:1 64x64:4:1", "64x64:4:1 64x64:4:1", "32x32:4:1 32x32:4:1"),
    },
}
"""Tiles of many queries in 16 bits, rows x keys : warps : stages, where a head's row has up to 128,
256 and 512 bytes: first where there are programs enough for two of each multiprocessor, then for
fewer. They are those of the fewest instructions a score that hardly spill where they are compiled
(benchmarks.triton_compile); no GPU has timed them."""


LARGEST_ROWS = 128
"""Of a tile in `PREFILL_TILES`."""


def kind_of_variant(variant: Variant, unit_keys: bool) -> str:
    """Return what of a variant takes registers; `unit_keys`: scores are divided by the keys'
    lengths."""
    if variant.stateful:
        return STATEFUL
    return GATED if variant.gated else WIDE if unit_keys else PLAIN


def tile_for(
    phase: str,
    arch: str,
    head_size: int,
    element_size: int,
    group: int,
    kv_bits: int = 0,
    kind: str = PLAIN,
    many: bool = True,
) -> Tile:
    """Return the tile of a kernel.

    Args:
        phase: DECODE (one query a request) or PREFILL.
        arch: "sm_90", "gfx942".
        head_size: of a head.
        element_size: bytes of an element of queries.
        group: query heads of a KV head.
        kv_bits: of keys and values in 8 or 4 bits, whose way to the queries' dtype takes registers;
            else 0.
        kind: of the variant, `kind_of_variant`.
        many: there are queries enough to fill the device with large tiles.
    """
    least = max(16, triton.next_power_of_2(group))
    row_bytes = triton.next_power_of_2(head_size) * element_size
    amd = arch.startswith("gfx")
    if not amd and arch not in SHARED_MEMORY:
        arch = "sm_100" if arch == "sm_103" else "sm_80"  # others have less shared memory yet
    stages = 1 if amd else 3 if element_size == 2 else 2
    keys = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    if kv_bits and row_bytes >= 256:
        keys = max(16, keys // 2)
    # float32 is multiplied by plain arithmetic, whose operands are in registers.
    num_warps = 8 if element_size == 4 else 4
    if phase == DECODE:
        return Tile(least, keys, num_warps, stages)
    if element_size == 4:
        return Tile(max(least, 32), 32 if row_bytes <= 256 else 16, num_warps, stages)
    if kv_bits and row_bytes == 256 and kind in (PLAIN, WIDE) and arch in ("sm_90", "sm_100"):
        return Tile(max(least, 128), 32, 8, 2)
    if kv_bits or row_bytes > 512:
        rows = 64 if row_bytes <= (128 if arch == "sm_80" else 256) else 32
        if kv_bits == 4 and row_bytes == 256 and arch in ("sm_80", "sm_90"):
            keys, num_warps = 16, 8  # with 32 and 4, lssar and selective spill
        return Tile(max(least, rows), keys, num_warps, min(stages, 2))
    by_size = PREFILL_TILES[kind]["gfx" if amd else arch]
    sizes = by_size[0 if row_bytes <= 128 else 1 if row_bytes == 256 else 2].split()
    size, warps, stage_count = sizes[not many].split(":")
    rows, keys = map(int, size.split("x"))
    return Tile(max(least, rows), keys, int(warps), int(stage_count))


FORWARD, BACKWARD_QUERIES, BACKWARD_KEYS, SELECTIONS = (
    *("forward", "backward of queries", "backward of keys"),
    "backward of selections",
)
"""The kernels of training (`triton/training.py`)."""

LARGEST_HEAD_SIZE = 256
"""Of training: of 512, a tile of queries and its gradient are more than an H100's shared memory."""


TRAINING_TILES = {
    PLAIN: {
        "sm": ("128x64 128x64 32x128", "128x64 128x64 32x64", "64x32 64x32 32x32"),
        "sm_80": ("128x64 64x64 32x128", "128x32 64x64 32x64", "64x32 64x32 32x32"),
        "gfx": ("64x64 64x64 32x64", "64x64 64x32 32x32", "32x32 32x32 32x32"),
    },
    WIDE: {  # scores that take registers
        "sm": ("128x64 64x64 32x64", "128x64 64x32 32x32", "64x32 64x32 32x32"),
        "sm_80": ("128x32 64x32 32x64", "128x32 64x32 32x32", "64x32 64x32 32x32"),
        "gfx": ("64x64 64x64 32x64", "64x64 64x32 32x32", "32x32 32x32 32x32"),
    },
    STATEFUL: {
        "sm": ("32x64 32x64 32x64 32x64", "32x64 32x64 32x32 32x64", "32x32 32x32 32x32 32x32"),
        "sm_80": ("32x64 32x64 32x32 32x64", "32x64 32x64 32x32 32x64", "32x32 32x32 32x32 32x32"),
        "gfx": ("32x32 32x32 32x32 32x32", "32x32 32x32 32x32 32x32", "32x32 32x32 32x32 32x32"),
    },
}
"""Rows by keys of the kernels of training in 16 bits, forward, backward of queries, of keys and of
selections, where a head's row has up to 128, 256 and 512 bytes: the largest that hardly spill where
they are compiled (benchmarks.triton_compile --training). The tiles of a stateful variant's queries
are the same in all kernels: its accumulators are stored ahead of each."""


def training_tile(
    kernel: str, arch: str, dims: int, element_size: int, *, stateful: bool, wide: bool
) -> Tile:
    """Return the tile of a kernel of training.

    Args:
        kernel: FORWARD, BACKWARD_QUERIES, BACKWARD_KEYS or SELECTIONS.
        arch: "sm_90", "gfx942".
        dims: head size, rounded up to a power of two.
        element_size: bytes of an element of queries.
        stateful: the variant has accumulators.
        wide: its scores take registers: they are divided by the keys' lengths, or decay by gates.
    """
    row_bytes = dims * element_size
    amd = arch.startswith("gfx")
    stages = 1 if amd else 2
    if not amd and arch not in SHARED_MEMORY and arch != "sm_103":  # L4, L40S, GeForce have less
        arch, stages = "sm_80", 1
    if element_size == 4:
        return Tile(32, 32 if row_bytes <= 512 else 16, 8, stages)
    of_kind = TRAINING_TILES[STATEFUL if stateful else WIDE if wide else PLAIN]
    by_size = of_kind.get(arch, of_kind["gfx" if amd else "sm"])
    tiles = by_size[0 if row_bytes <= 128 else 1 if row_bytes == 256 else 2].split()
    order = (FORWARD, BACKWARD_QUERIES, BACKWARD_KEYS, SELECTIONS)
    rows, keys = map(int, tiles[order.index(kernel)].split("x"))
    # AMD's warps are 64 threads, which in a program of 4 have 512 registers each, of 8 half.
    return Tile(rows, keys, 4 if amd else 8, stages)


KEYS_OF_PART = 1024
"""Keys that a part of a context has, of the longest request, where there are many queries: fewer
would take less time than adding up the parts."""


def parts_for(phase: str, num_programs: int, num_multiprocessors: int, max_seq_len: int) -> int:
    """Return how many parts of a context let few programs fill the device: a power of 2. Of a
    decode, where it must not depend on the contexts; of a prefill 1, 4 or 16, so that few kernels
    are compiled."""
    wanted = triton.cdiv(2 * num_multiprocessors, num_programs)
    if phase == DECODE:
        return min(32, triton.next_power_of_2(wanted))
    wanted = min(wanted, max_seq_len // KEYS_OF_PART)
    return 16 if wanted >= 16 else 4 if wanted >= 4 else 1
