"""Which tiles of a kernel are tried."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import torch
import triton

from attn_kernels import get_variant, variant_names
from attn_kernels.triton.tuned import GLUON_SIZES, PHASES, SHORT_PREFILL, Kind, for_gluon
from attn_kernels.triton.tuning import (
    BLOCK_SIZE,
    DECODE,
    GLUON,
    PREFILL,
    SHARED_MEMORY,
    Tile,
    kind_of_variant,
    tile_for,
)
from attn_kernels.triton.variant import functions, has_kernel, is_plain
from attnserve.errors import UserError

ROWS, KEYS, WARPS, STAGES = (16, 32, 64, 128), (16, 32, 64, 128), (4, 8), (1, 2, 3, 4, 5)


def kinds_of(
    *,
    phases: Sequence[str] | None = None,
    variants: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    head_sizes: Sequence[int] | None = None,
    groups: Sequence[int] | None = None,
    block_sizes: Sequence[int] | None = None,
) -> list[Kind]:
    """Return the kernels that are tuned: of every combination, where None stands for all phases,
    all variants that have a kernel, bfloat16, heads of 128 in groups of 4, and blocks as served."""
    names = [get_variant(name).name for name in variants or variant_names()]
    return [
        Kind(phase, name, dtype, dtype, size, group, block_size)
        for dtype, size, group, block_size, phase, name in itertools.product(
            dtypes or ["bfloat16"],
            head_sizes or [128],
            groups or [4],
            block_sizes or [BLOCK_SIZE],
            phases or PHASES,
            [name for name in names if has_kernel(get_variant(name))],
        )
    ]


def listed(path: Path, arch: str) -> dict[str, list[Tile]]:
    """Return the candidates of kernels, by their names, from a file that
    `benchmarks.triton_compile.candidates` wrote: a JSON line about all, then one a kernel.

    Raises:
        UserError: it is none, or for another architecture.
    """
    try:
        about, *rows = map(json.loads, path.read_text(encoding="utf-8").splitlines())
        found = {kind: [Tile(**tile) for tile in tiles] for kind, tiles in rows}
        of = about["arch"]
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{path} lists no candidates: {error}") from None
    if of != arch:
        raise UserError(f"{path} lists candidates for {of}, and here is {arch}")
    return found


def usual_tile(kind: Kind, arch: str) -> Tile:
    """Return the tile of a kernel that nobody has tuned."""
    variant = get_variant(kind.variant)
    size = getattr(torch, kind.dtype).itemsize
    return tile_for(
        DECODE if kind.phase == DECODE else PREFILL,
        arch,
        kind.head_size,
        size,
        kind.group,
        kind=kind_of_variant(variant, functions(variant)["VARIANT"].unit_keys),
        many=kind.phase != SHORT_PREFILL,
    )


def candidates(kind: Kind, arch: str, *, few: bool = False) -> list[Tile]:
    """Return the tiles that are tried for a kernel: the usual one, then from its neighbours on to
    others.

    Decode has a fixed number of rows, a token's, and more would be empty. What cannot fit into
    registers is left out.

    Args:
        kind: the kernel.
        arch: "sm_90", "gfx942".
        few: only tiles up to 32 by 32, with 4 warps and one stage, beside the usual one.
    """
    usual = usual_tile(kind, arch)
    every: Iterable[Tile] = itertools.starmap(Tile, itertools.product(ROWS, KEYS, WARPS, STAGES))
    if few:
        every = itertools.starmap(Tile, itertools.product((16, 32), (16, 32), (4,), (1,)))
    else:
        every = itertools.chain(gluon_tiles(kind, arch), every)
    if kind.phase == DECODE:
        every = (tile for tile in every if tile.rows == usual.rows)
    fit = [tile for tile in every if tile.rows >= kind.group and fits(tile, kind.head_size, arch)]
    return list(dict.fromkeys([usual, *sorted(fit, key=lambda tile: distance(tile, usual))]))


def gluon_tiles(kind: Kind, arch: str) -> Iterator[Tile]:
    """Yield the tiles of the kernel in Gluon, if it is for such a kernel and variant. It has rings
    of `num_stages` tiles of keys, and of values, in shared memory, beside the queries."""
    if not for_gluon(kind, arch) or not is_plain(functions(get_variant(kind.variant))):
        return
    for rows, keys, stages in itertools.product(GLUON_SIZES, GLUON_SIZES, STAGES[1:]):
        if 2 * kind.head_size * (rows + 2 * stages * keys) < SHARED_MEMORY[arch]:
            yield Tile(rows, keys, rows // 16, stages, GLUON)


def fits(tile: Tile, head_size: int, arch: str) -> bool:
    """Return whether a thread's registers hold its share of outputs and scores, in float32."""
    lanes, registers = (64, 512) if arch.startswith("gfx") else (32, 255)
    numbers = tile.rows * (triton.next_power_of_2(head_size) + tile.keys)
    return numbers < registers * lanes * tile.num_warps


def distance(tile: Tile, other: Tile) -> float:
    """Return how far two tiles are apart: 1 where a size is double, half of it a stage."""
    sizes = ((getattr(x, name) for x in (tile, other)) for name in ("rows", "keys", "num_warps"))
    return (
        sum(abs(math.log2(a / b)) for a, b in sizes) + abs(tile.num_stages - other.num_stages) / 2
    )
