"""Sizes of tiles, warps and stages for each architecture: a small table."""

from __future__ import annotations

from dataclasses import dataclass

import triton


@dataclass(frozen=True)
class Tile:
    """How a kernel is cut up and compiled."""

    rows: int
    """Query rows of a program: a power of two, at least 16 (a tensor core's)."""
    keys: int
    """Keys that a program multiplies at once."""
    num_warps: int = 4
    num_stages: int = 2

    def queries(self, group: int) -> int:
        """Queries of a tile if `group` heads share a KV head."""
        return self.rows // group


DECODE, PREFILL = "decode", "prefill"

SHARED_MEMORY = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "gfx942": 65_536}
"""Bytes that a program may have, by architecture (CUDA's and ROCm's documentation)."""


def tile_for(phase: str, arch: str, head_size: int, element_size: int, group: int) -> Tile:
    """The tile of a kernel.

    Args:
        phase: DECODE (one query a request) or PREFILL.
        arch: "sm_90", "gfx942".
        head_size: of a head.
        element_size: bytes of an element of queries.
        group: query heads of a KV head.
    """
    least = max(16, triton.next_power_of_2(group))
    row_bytes = triton.next_power_of_2(head_size) * element_size
    stages = 1 if arch.startswith("gfx") else 2
    if phase == DECODE:
        keys = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
        return Tile(least, keys, num_warps=4, num_stages=stages)
    rows = 64 if row_bytes <= 256 else 32
    keys = 64 if row_bytes <= 256 else 32 if row_bytes <= 512 else 16
    return Tile(max(least, rows), keys, num_warps=4, num_stages=stages)


def parts_for(num_programs: int, num_processors: int) -> int:
    """Into how many parts to cut contexts so that a few requests fill the device: a power of 2."""
    if num_programs >= 2 * num_processors:
        return 1
    return min(32, triton.next_power_of_2(triton.cdiv(2 * num_processors, num_programs)))
