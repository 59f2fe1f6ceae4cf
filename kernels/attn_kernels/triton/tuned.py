"""Tiles that were measured to be the fastest: tables that `attnserve tune` writes.

A table is a JSON object: `arch`, and `tiles`, each with what it is for (`Kind`) and what it is
(`Tile`). There is one for a GPU and a version of Triton, `NVIDIA_H200,triton=3.6.json`, or for an
architecture, `sm_90.json`. The user's tables come before those of the package, and a device's
before an architecture's.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from attn_kernels.triton.tuning import DECODE, GLUON, KERNELS, PREFILL, Tile

PACKAGED = Path(__file__).parent / "configs"

VARIABLE = "ATTNSERVE_TRITON_CONFIGS"
"""Environment variable that names the user's folder of tables."""


SHORT_PREFILL = "short-prefill"
"""A prefill of too few queries to fill the device with large tiles (`TritonLayer.tile`)."""

PHASES = (DECODE, PREFILL, SHORT_PREFILL)


class Kind(NamedTuple):
    """What the speed of a tile depends on, beside the device and the numbers of tokens."""

    phase: str
    """One of PHASES."""
    variant: str
    dtype: str
    """Of queries: "bfloat16"."""
    cache: str
    """Of keys and values: a dtype, or the bits of each where they are quantized, "8 bits"."""
    head_size: int
    group: int
    """Query heads of a KV head."""
    block_size: int

    def __str__(self) -> str:
        cache = "" if self.cache == self.dtype else f", cache {self.cache}"
        sizes = f"D{self.head_size}, group {self.group}, blocks of {self.block_size}"
        return f"{self.phase} {self.variant} {self.dtype}{cache}, {sizes}"


Tiles = dict[Kind, Tile]


class TableError(ValueError):
    """A table cannot be read: one line that names the file and the key."""


GLUON_SIZES = (64, 128)
"""Rows, and keys, of a tile of the kernel in Gluon, which has a warp for 16 rows."""


def for_gluon(kind: Kind, arch: str) -> bool:
    """Return whether `triton/hopper.py` may be what attends, if the layer has nothing that it does
    not know."""
    return (
        arch == "sm_90"
        and kind.phase != DECODE
        and kind.dtype in ("bfloat16", "float16")
        and kind.cache == kind.dtype
        and kind.head_size in (64, 128)
        and kind.block_size >= 16
        and kind.block_size & (kind.block_size - 1) == 0
    )


@functools.cache
def kind_of(
    phase: str,
    variant: str,
    dtype: torch.dtype,
    cache_dtype: torch.dtype,
    head_size: int,
    group: int,
    block_size: int,
    kv_bits: int = 0,
    many: bool = True,
) -> Kind:
    """Return what a layer's tile is looked up by.

    Args:
        phase: tuning.DECODE or tuning.PREFILL.
        variant: its name.
        dtype: of queries.
        cache_dtype: of the cache's elements.
        head_size: of a head.
        group: query heads of a KV head.
        block_size: tokens of a block.
        kv_bits: of quantized keys and values, else 0.
        many: there are queries enough to fill the device with large tiles.
    """
    phase = SHORT_PREFILL if phase == PREFILL and not many else phase
    cache = f"{kv_bits} bits" if kv_bits else str(cache_dtype).removeprefix("torch.")
    own = str(dtype).removeprefix("torch.")
    return Kind(phase, variant, own, cache, head_size, group, block_size)


_trial: Tile | None = None


@contextmanager
def trying(tile: Tile) -> Iterator[None]:
    """Give this tile to every layer that asks inside, whatever the tables say."""
    global _trial
    before, _trial = _trial, tile
    try:
        yield
    finally:
        _trial = before


def trial() -> Tile | None:
    """Return the tile that is tried, inside `trying`."""
    return _trial


def tuned_tile(kind: Kind, arch: str, device: torch.device) -> Tile | None:
    """Return the tile that was measured for a kernel; None if none was.

    Args:
        kind: the kernel.
        arch: "sm_90", "gfx942".
        device: where it runs; other devices than GPUs have no tables of their own.

    Raises:
        TableError: a table cannot be read.
    """
    return _looked_up(kind, arch, device)


@functools.cache
def _looked_up(kind: Kind, arch: str, device: torch.device) -> Tile | None:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else ""
    for path in paths(arch, name):
        if os.path.isfile(path) and kind in (tiles := read(path)[1]):
            return tiles[kind]
    return None


def paths(arch: str, device_name: str = "") -> list[Path]:
    """Return where tables of a device may be, the first that has a kernel counts."""
    names = ([file_name(device_name)] if device_name else []) + [f"{arch}.json"]
    return [folder / name for name in names for folder in (user_folder(), PACKAGED) if folder]


def user_folder() -> Path | None:
    """Return the folder of the user's own tables; None: a user without a home has none."""
    cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    try:
        return Path(os.environ.get(VARIABLE) or f"{cache}/attnserve/triton").expanduser()
    except RuntimeError:
        return None


def file_name(device_name: str) -> str:
    """Return the name of a device's table for this version of Triton, whose last number does not
    count."""
    version = ".".join(triton.__version__.split(".")[:2])
    device = re.sub(r"[^\w.+-]+", "_", device_name)
    return f"{device},triton={version}.json"


@functools.cache
def read(path: Path) -> tuple[str, Tiles]:
    """Return a table's architecture and tiles.

    Raises:
        TableError: it is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise TableError(f"{path}: no table of tiles: {error}") from None
    try:
        return _parsed(content)
    except ValueError as error:
        raise TableError(f"{path}: {error}") from None


def text_of(arch: str, tiles: Mapping[Kind, Tile], **about: Any) -> str:
    """Return a table as a file has it, a line a tile; `about` says how it was made."""
    head = [f"{json.dumps(key)}: {json.dumps(value)}" for key, value in about.items()]
    rows = [json.dumps(kind._asdict() | dataclasses.asdict(tile)) for kind, tile in tiles.items()]
    listed = ",\n".join(f" {row}" for row in rows)
    return ",\n".join(["{" + f'"arch": {json.dumps(arch)}', *head, f'"tiles": [\n{listed}\n]}}\n'])


def _parsed(content: Any) -> tuple[str, Tiles]:
    """Return what `read` does; errors name the key."""
    if not isinstance(content, dict):
        raise ValueError("it is no JSON object")
    arch = content.get("arch")
    if not isinstance(arch, str):
        raise ValueError('arch: missing, or no string like "sm_90"')
    rows = content.get("tiles")
    if not isinstance(rows, list):
        raise ValueError("tiles: missing, or no list")
    tiles: Tiles = {}
    for index, row in enumerate(rows):
        try:
            kind, tile = _entry(row)
            if tile.kernel == GLUON:
                _check_gluon(kind, tile, arch)
            if kind in tiles:
                raise ValueError(": it is for the same kernel as one before")
        except ValueError as error:
            raise ValueError(f"tiles[{index}]{error}") from None
        tiles[kind] = tile
    return arch, tiles


def _check_gluon(kind: Kind, tile: Tile, arch: str) -> None:
    """Raise ValueError for a tile that the kernel in Gluon does not have."""
    if not for_gluon(kind, arch):
        raise ValueError(f".kernel: {GLUON!r} does not attend for {kind} on {arch}")
    for name, value in (("rows", tile.rows), ("keys", tile.keys)):
        if value not in GLUON_SIZES:
            raise ValueError(f".{name}: {GLUON!r} has 64 or 128, not {value}")
    if tile.num_stages < 2:
        raise ValueError(f".num_stages: {GLUON!r} has 2 or more, not {tile.num_stages}")
    if tile.num_warps != tile.rows // 16:
        raise ValueError(f".num_warps: {GLUON!r} has {tile.rows // 16} for {tile.rows} rows")


TILE_FIELDS = dataclasses.fields(Tile)
NEEDED = [*Kind._fields, *(f.name for f in TILE_FIELDS if f.default is dataclasses.MISSING)]
TEXTS = ("phase", "variant", "dtype", "cache", "kernel")


def _entry(row: Any) -> tuple[Kind, Tile]:
    """Return one of a table's tiles; an error's message begins with what follows `tiles[N]`."""
    if not isinstance(row, dict):
        raise ValueError(": it is no JSON object")
    known = [*Kind._fields, *(field.name for field in TILE_FIELDS)]
    for name in NEEDED:
        if name not in row:
            raise ValueError(f".{name}: missing")
    for name, value in row.items():
        if name not in known:
            raise ValueError(f".{name}: unknown; known are {', '.join(known)}")
        right = isinstance(value, str) if name in TEXTS else type(value) is int and value >= 0
        if not right:
            wanted = "a string" if name in TEXTS else "a whole number"
            raise ValueError(f".{name}: {value!r} is not {wanted}")
    kind = Kind(*(row[name] for name in Kind._fields))
    if kind.phase not in PHASES:
        raise ValueError(f".phase: {kind.phase!r} is none of {', '.join(PHASES)}")
    tile = Tile(**{name: row[name] for name in row if name not in Kind._fields})
    for name, least in (("rows", 16), ("keys", 16), ("num_warps", 1)):
        value = getattr(tile, name)
        if value < least or value & (value - 1):
            raise ValueError(f".{name}: {value} is no power of two from {least} on")
    if tile.rows < kind.group:
        raise ValueError(f".rows: {tile.rows} is less than the group of {kind.group} heads")
    if tile.kernel not in KERNELS:
        raise ValueError(f".kernel: {tile.kernel!r} is none of {', '.join(KERNELS)}")
    if tile.num_stages < 1:
        raise ValueError(".num_stages: 0 is less than 1")
    return kind, tile
