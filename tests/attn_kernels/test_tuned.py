"""Tables of tiles: which one counts, what is refused, and that a layer asks for its own."""

from __future__ import annotations

import dataclasses
import itertools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import triton

from attn_kernels import get_variant, reference
from attn_kernels.triton import tuned
from attn_kernels.triton.layer import device_figures
from attn_kernels.triton.tuning import (
    BACKWARD_KEYS,
    BACKWARD_QUERIES,
    DECODE,
    FORWARD,
    GLUON,
    PREFILL,
    PREFILL_TILES,
    Tile,
    tile_for,
    training_tile,
)
from tests.attn_kernels.test_paged import relative_error
from tests.attn_kernels.test_triton import TOLERANCE, single

KIND = tuned.Kind(PREFILL, "softpick", "bfloat16", "bfloat16", 128, 4, 16)
CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[Path, Path]]:
    """Make the user's folder and the package's, both empty."""
    user, packaged = tmp_path / "user", tmp_path / "packaged"
    monkeypatch.setenv(tuned.VARIABLE, str(user))
    monkeypatch.setattr(tuned, "PACKAGED", packaged)
    for folder in (user, packaged):
        folder.mkdir()
    forget()
    yield user, packaged
    forget()


def forget() -> None:
    """Forget the tables that were read."""
    tuned._looked_up.cache_clear()
    tuned.read.cache_clear()


def write(path: Path, rows: int, kind: tuned.Kind = KIND) -> None:
    path.write_text(tuned.text_of("sm_90", {kind: Tile(rows, 64, 8, 3)}, device="an H200"))
    forget()


def found(kind: tuned.Kind = KIND) -> int | None:
    tile = tuned.tuned_tile(kind, "sm_90", CPU)
    return tile.rows if tile else None


def test_which_table_counts(folders: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The device's before the architecture's, the user's before the package's; and only those that
    have the kernel."""
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda _: "NVIDIA H200 (MIG 1g/18GB)")
    monkeypatch.setattr(triton, "__version__", "3.6.0")
    device = "NVIDIA_H200_MIG_1g_18GB_,triton=3.6.json"
    cuda = torch.device("cuda", 0)

    def rows() -> int | None:
        tile = tuned.tuned_tile(KIND, "sm_90", cuda)
        return tile.rows if tile else None

    user, packaged = folders
    assert rows() is None
    places = [packaged / "sm_90.json", user / "sm_90.json", packaged / device, user / device]
    for number, path in enumerate(places):
        write(path, 16 << number)
        assert rows() == 16 << number
    assert found() == 32  # without a GPU: the architecture's
    assert tuned.tuned_tile(KIND, "sm_80", CPU) is None
    assert found(KIND._replace(block_size=32)) is None
    write(user / device, 16, KIND._replace(variant="softmax"))
    assert rows() == 64


def test_where_the_user_has_tables(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(tuned.VARIABLE)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert tuned.user_folder() == tmp_path / "attnserve/triton"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuned.user_folder() == tmp_path / ".cache/attnserve/triton"


def test_a_user_without_a_home_has_no_tables(monkeypatch: pytest.MonkeyPatch) -> None:
    """As in a container whose user nobody knows."""
    for name in (tuned.VARIABLE, "XDG_CACHE_HOME", "HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(os, "getuid", lambda: 54321)
    assert tuned.user_folder() is None
    assert found() is None


def test_what_is_written_is_read(folders: tuple[Path, Path]) -> None:
    kinds = [KIND, KIND._replace(phase=DECODE, cache="8 bits"), KIND._replace(head_size=64)]
    tiles = {kind: Tile(64, 16 << n, 4, n + 1) for n, kind in enumerate(kinds)}
    path = folders[0] / "sm_90.json"
    path.write_text(tuned.text_of("sm_90", tiles, commit="0123"))
    assert tuned.read(path) == ("sm_90", tiles)
    assert json.loads(path.read_text())["commit"] == "0123"
    path.write_text(tuned.text_of("sm_90", {}))
    forget()
    assert tuned.read(path) == ("sm_90", {})


def with_entry(**changes: Any) -> Callable[[dict[str, Any]], Any]:
    """Return what changes the table's second entry; None takes a key away."""

    def change(table: dict[str, Any]) -> Any:
        entry = table["tiles"][1]
        entry |= changes
        table["tiles"][1] = {key: value for key, value in entry.items() if value is not None}
        return table

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: [], "it is no JSON object"),
        (lambda table: {"tiles": []}, "arch: missing"),
        (lambda table: table | {"tiles": {}}, "tiles: missing, or no list"),
        (lambda table: table | {"tiles": table["tiles"][:1] * 2}, "tiles[1]: it is for the same"),
        (lambda table: table | {"tiles": [3]}, "tiles[0]: it is no JSON object"),
        (with_entry(rows=None), "tiles[1].rows: missing"),
        (with_entry(group=None), "tiles[1].group: missing"),
        (with_entry(rows="64"), "tiles[1].rows: '64' is not a whole number"),
        (with_entry(rows=True), "tiles[1].rows: True is not a whole number"),
        (with_entry(rows=48), "tiles[1].rows: 48 is no power of two from 16 on"),
        (with_entry(keys=8), "tiles[1].keys: 8 is no power of two from 16 on"),
        (with_entry(num_warps=0), "tiles[1].num_warps: 0 is no power of two from 1 on"),
        (with_entry(num_stages=0), "tiles[1].num_stages: 0 is less than 1"),
        (with_entry(group=128), "tiles[1].rows: 64 is less than the group of 128 heads"),
        (
            with_entry(phase="prefil"),
            "tiles[1].phase: 'prefil' is none of decode, prefill, short-prefill",
        ),
        (with_entry(dtype=16), "tiles[1].dtype: 16 is not a string"),
        (with_entry(kernel="cuda"), "tiles[1].kernel: 'cuda' is none of triton, gluon"),
        (
            with_entry(kernel="gluon", keys=64, num_warps=8),
            "tiles[1].num_warps: 'gluon' has 4 for 64 rows",
        ),
        (
            with_entry(kernel="gluon", keys=64, num_stages=1),
            "tiles[1].num_stages: 'gluon' has 2 or more, not 1",
        ),
        (with_entry(kernel="gluon", rows=32), "tiles[1].rows: 'gluon' has 64 or 128, not 32"),
        (with_entry(kernel="gluon", keys=32), "tiles[1].keys: 'gluon' has 64 or 128, not 32"),
        (
            with_entry(kernel="gluon", head_size=256),
            "tiles[1].kernel: 'gluon' does not attend for prefill softmax bfloat16, D256, group 4",
        ),
        (with_entry(kernel="gluon", phase=DECODE), "tiles[1].kernel: 'gluon' does not attend for"),
        (with_entry(kernel="gluon", cache="float16"), "tiles[1].kernel: 'gluon' does not attend"),
        (with_entry(stages=2), "tiles[1].stages: unknown; known are phase, variant, dtype"),
    ],
)
def test_a_wrong_table_is_one_line(
    change: Callable[[dict[str, Any]], Any], said: str, folders: tuple[Path, Path]
) -> None:
    path = folders[0] / "sm_90.json"
    tiles = {KIND: Tile(64, 64), KIND._replace(variant="softmax"): Tile(64, 32)}
    path.write_text(json.dumps(change(json.loads(tuned.text_of("sm_90", tiles)))))
    with pytest.raises(ValueError) as raised:
        found()
    assert str(raised.value).startswith(f"{path}: {said}") and "\n" not in str(raised.value)


def test_gluon_is_for_hopper(folders: tuple[Path, Path]) -> None:
    """A table names another kernel for a GPU that has it."""
    tile = Tile(128, 128, 8, 2, GLUON)
    for arch in ("sm_90", "sm_100"):
        (folders[0] / f"{arch}.json").write_text(tuned.text_of(arch, {KIND: tile}))
    assert tuned.tuned_tile(KIND, "sm_90", CPU) == tile
    with pytest.raises(ValueError, match="'gluon' does not attend for prefill softpick"):
        tuned.tuned_tile(KIND, "sm_100", CPU)


def test_no_json_is_one_line(folders: tuple[Path, Path]) -> None:
    path = folders[0] / "sm_90.json"
    path.write_text("{")
    with pytest.raises(ValueError, match="no table of tiles: Expecting") as raised:
        found()
    assert str(path) in str(raised.value)


@pytest.mark.parametrize("name", ["softpick", "softmax"])
def test_a_layer_takes_its_tile(name: str, folders: tuple[Path, Path]) -> None:
    """Of its own kernel; the answer is the same."""
    f32 = torch.float32
    kind = tuned.kind_of(PREFILL, name, f32, f32, 32, 2, 16, many=False)
    assert kind.phase == tuned.SHORT_PREFILL
    path = folders[0] / f"{device_figures(CPU)[0]}.json"
    for tile in (Tile(16, 16), Tile(64, 128)):
        path.write_text(tuned.text_of("sm_90", {kind: tile}))
        forget()
        got = single(name, torch.float32)
        wanted, _ = reference.attention(get_variant(name), got.q, got.k, got.v, scale=0.2)
        assert relative_error(got.output, wanted) <= TOLERANCE
    impossible = Tile(48, 16)
    with tuned.trying(impossible), pytest.raises(Exception, match="power of 2"):
        single(name, torch.float32)
    single(name, torch.float32)


def test_a_layer_asks_with_what_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuned.Kind] = []
    monkeypatch.setattr(tuned, "tuned_tile", lambda kind, arch, device: asked.append(kind))
    single("lssa", torch.int8, key_scale=torch.ones(1), value_scale=torch.ones(1))
    assert asked == [tuned.Kind(tuned.SHORT_PREFILL, "lssa", "float32", "int8", 32, 2, 16)]


@pytest.mark.parametrize("kind", PREFILL_TILES)
@pytest.mark.parametrize("head_size", [64, 128, 256])
def test_gpus_with_less_shared_memory(kind: str, head_size: int) -> None:
    """L4, L40S and GeForce have 99 KiB a program: what an A100 has room for, not an H100."""
    for phase, many, kv_bits in itertools.product((DECODE, PREFILL), (True, False), (0, 4, 8)):
        sizes = head_size, 2, 4, kv_bits, kind, many
        for arch in ("sm_86", "sm_89", "sm_120"):
            assert tile_for(phase, arch, *sizes) == tile_for(phase, "sm_80", *sizes)
    for kernel in (FORWARD, BACKWARD_QUERIES, BACKWARD_KEYS):  # with two stages 128 KiB
        of_a100, of_l4 = (
            training_tile(kernel, arch, head_size, 2, stateful=False, wide=True)
            for arch in ("sm_80", "sm_89")
        )
        assert of_l4 == dataclasses.replace(of_a100, num_stages=1)
