"""`attnserve tune`: its dry run in Triton's interpreter, what it drops, and what it compiles."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_kernels.triton import tuned
from attn_kernels.triton.tuning import DECODE, GLUON, PREFILL, TRITON, Tile
from attnserve.errors import UserError
from attnserve.files import Journal
from attnserve.tune import search
from attnserve.tune.candidates import (
    KEYS,
    ROWS,
    STAGES,
    WARPS,
    candidates,
    fits,
    listed,
    usual_tile,
)
from attnserve.tune.command import tune
from attnserve.tune.compiling import Compilers, Place, Task
from attnserve.tune.trial import trial
from attnserve.tune.work import CHECKED, LOADS, TINY_LOADS, Load, Work, error_of
from tests.conftest import Commands

KIND = tuned.Kind(PREFILL, "softpick", "float32", "float32", 16, 2, 16)
PLACE = Place("cpu", 2, True)


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Kernels are interpreted, and no table is found."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv(tuned.VARIABLE, str(tmp_path / "none"))


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="it is the refusal of a machine without a GPU, and here is one",
)
def test_no_gpu_is_one_line(commands: Commands) -> None:
    assert "finds no GPU to tune for; --device cpu is a dry run" in commands.refused(tune)


@pytest.mark.integration
def test_dry_run(tmp_path: Path, commands: Commands) -> None:
    """All stages; run again, what was measured stays; what is new joins it in the table."""
    out = tmp_path / "out"
    arguments = ["--device=cpu", "--variants", "softpick", "--jobs=1", f"--out={out}", "--json"]
    found = json.loads(commands.run(tune, *arguments, "--phases", "decode"))
    (table,) = out.glob("*.json")
    assert found["table"] == str(table) and table.name.endswith(f"{found['triton'][:3]}.json")
    kind = tuned.Kind(DECODE, "softpick", "float32", "float32", 16, 2, 64)
    (result,) = found["kinds"].values()
    assert found["kinds"] == {str(kind): result}
    assert len(result["us"]) == len(result["usual_us"]) == 2 and min(result["us"]) > 0
    assert result["timed"] == 3 and 0 < result["ratio"] <= 1
    assert tuned.read(table) == (found["arch"], {kind: Tile(**result["tile"])})
    assert "3 of 3 candidates compiled" in commands.printed.err

    again = json.loads(commands.run(tune, *arguments, "--minutes=0"))
    assert again["kinds"] == {str(kind): result}
    assert "out of time, run again for 2 more" in commands.printed.err

    commands.run(tune, *arguments, "--phases", "prefill", "--minutes=0.3")
    tuned.read.cache_clear()
    assert set(tuned.read(table)[1]) == {kind, kind._replace(phase=PREFILL)}


def test_what_was_measured_elsewhere_is_refused(tmp_path: Path, commands: Commands) -> None:
    arguments = ["--device=cpu", "--minutes=0", f"--out={tmp_path}"]
    commands.run(tune, *arguments)
    (journal,) = tmp_path.glob("*.jsonl")
    journal.write_text(journal.read_text().replace('"arch": "sm_90"', '"arch": "sm_80"'))
    assert "has values that differ in arch: --force" in commands.refused(tune, *arguments)
    commands.run(tune, *arguments, "--force")


def test_interrupted_while_compiling(tmp_path: Path) -> None:
    """It ends at once, with one line, and so do its compilers."""
    command = [sys.executable, "-m", "attnserve.tune.command", "--device=cpu", "--jobs=2"]
    process = subprocess.Popen(
        [*command, f"--out={tmp_path}"],
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # What a shell runs in the background ignores it.
        preexec_fn=functools.partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )
    try:
        while not [*tmp_path.glob("*.jsonl")]:  # written when compilers are about to start
            assert process.poll() is None
            time.sleep(0.1)
        time.sleep(1)
        os.killpg(process.pid, signal.SIGINT)
        _, said = process.communicate(timeout=20)
    finally:
        process.kill()
    assert process.returncode == 130
    assert said == "python -m attnserve.tune.command: interrupted\n"


@pytest.mark.parametrize("content", ["{", "[]\n{}\n", "{}\n3\n"])
@pytest.mark.parametrize("suffix", [".json", ".jsonl"])
def test_broken_files_are_one_line(
    suffix: str, content: str, tmp_path: Path, commands: Commands
) -> None:
    """A table that cannot be read, and a list of values that is none, before anything is timed; a
    list's last line may be cut short."""
    arguments = ["--device=cpu", "--minutes=0", f"--out={tmp_path}"]
    commands.run(tune, *arguments)
    (journal,) = tmp_path.glob("*.jsonl")
    path = journal.with_suffix(suffix)
    path.write_text(content)
    if path == journal and content == "{":
        commands.run(tune, *arguments)
    else:
        assert str(path) in commands.refused(tune, *arguments)


def test_only_listed_candidates(tmp_path: Path, commands: Commands) -> None:
    """A list of another architecture, or none, is one line."""
    path = tmp_path / "list"
    arguments = ["--device=cpu", "--minutes=0", f"--out={tmp_path}", f"--candidates={path}"]
    assert f"{path} lists no candidates: " in commands.refused(tune, *arguments)
    tiles = [Tile(64, 32), Tile(16, 16)]
    rows = [{"arch": "sm_90"}, ["decode softpick", [dataclasses.asdict(tile) for tile in tiles]]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert listed(path, "sm_90") == {"decode softpick": tiles}
    commands.run(tune, *arguments)
    path.write_text(path.read_text().replace("sm_90", "sm_80"))
    assert "lists candidates for sm_80, and here is sm_90" in commands.refused(tune, *arguments)


@pytest.mark.parametrize("phase", tuned.PHASES)
@pytest.mark.parametrize(("dtype", "size"), [("bfloat16", 128), ("bfloat16", 256), ("float32", 64)])
@pytest.mark.parametrize("arch", ["sm_80", "sm_90", "gfx942"])
def test_candidates(phase: str, dtype: str, size: int, arch: str) -> None:
    """The usual tile comes first, neighbours next, each once; all have room for a group."""
    kind = tuned.Kind(phase, "softmax", dtype, dtype, size, 32, 16)
    found = candidates(kind, arch)
    usual = usual_tile(kind, arch)
    assert found[0] == usual and len(set(found)) == len(found) > 10
    assert all(tile.rows >= 32 for tile in found)
    assert {tile.rows for tile in found} == ({32} if phase == DECODE else {32, 64, 128})
    for tile in found[1:]:
        assert tile.kernel == TRITON or (arch, size, phase == DECODE) == ("sm_90", 128, False)
        assert tile.rows in ROWS and tile.keys in KEYS
        assert tile.num_warps in WARPS and tile.num_stages in STAGES
        assert fits(tile, size, arch)
    assert not fits(Tile(128, 128, 4), 256, "sm_90") and fits(Tile(128, 128, 8), 128, "sm_90")


def test_candidates_in_gluon() -> None:
    """On Hopper, for a prefill of a plain variant in 16 bits, as far as shared memory goes; and
    the tables take them."""
    kind = KIND._replace(phase=PREFILL, variant="softpick", dtype="bfloat16", cache="bfloat16")
    kind = kind._replace(head_size=128, group=4, block_size=64)

    def found(arch: str = "sm_90", few: bool = False, **changes: Any) -> list[Tile]:
        tiles = candidates(kind._replace(**changes), arch, few=few)
        return [tile for tile in tiles if tile.kernel == GLUON]

    tiles = found()
    assert tiles[0] == Tile(128, 128, 8, 2, GLUON) and Tile(64, 64, 4, 5, GLUON) in tiles
    assert Tile(128, 128, 8, 3, GLUON) in tiles and Tile(128, 128, 8, 4, GLUON) not in tiles
    assert Tile(128, 128, 8, 4, GLUON) in found(head_size=64)
    text = tuned.text_of("sm_90", {kind._replace(group=n): tile for n, tile in enumerate(tiles, 1)})
    assert len(tuned._parsed(json.loads(text))[1]) == len(tiles)
    assert not found("sm_100") and not found(few=True) and not found(phase=DECODE)
    assert not found(variant="lssa") and not found(dtype="float32") and not found(block_size=48)


def test_a_trial_in_a_process_of_its_own() -> None:
    """Of a tile that is right, one that cannot be compiled, and one that takes too long."""
    assert trial(KIND, Tile(16, 16), PLACE) == ""
    assert "Error" in trial(KIND, Tile(48, 16), PLACE)
    assert trial(KIND, Tile(16, 16), PLACE, 0.01) == "does not end within 0 s"


def test_halving() -> None:
    """The fastest are left, the fastest first, and were timed the most."""
    ran: dict[Tile, int] = {}

    def clock(tile: Tile) -> float:
        ran[tile] = ran.get(tile, 0) + 1
        return tile.keys / 1000

    tiles = [Tile(16, 16 * n) for n in (7, 3, 9, 1, 8, 2, 6, 4, 10, 5)]
    clocks = {tile: (lambda tile=tile: clock(tile)) for tile in tiles}
    best = search.halved(clocks, 2)
    assert [tile.keys for tile in best] == [16, 32]
    assert ran[Tile(16, 160)] < ran[Tile(16, 48)] < ran[best[0]] == ran[best[1]]
    assert search.halved({}, 2) == []


def searched(
    tmp_path: Path, tiles: list[Tile], kind: tuned.Kind = KIND
) -> tuple[dict[str, Any], Journal]:
    """Return what is found for a kind whose candidates all compile."""
    journal = Journal(tmp_path / "journal", {})
    bench = search.Bench("cpu", 2, 0, True)
    with Compilers(PLACE, 1) as compilers:
        # In the interpreter there is nothing to compile ahead: no time is given.
        compilers.compile = lambda tasks, deadline: {}  # type: ignore[method-assign]
        found = search.search(kind, tiles, bench, compilers, journal, time.monotonic() + 60)
    return found, journal


def test_tiles_that_fail_or_are_wrong_are_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fastest is wrong, another cannot be compiled: they are not tried again, and the next one
    is taken."""
    wrong, impossible, right, usual = Tile(32, 32), Tile(48, 16), Tile(16, 32), Tile(32, 16)
    attend, seconds = Work.attend, {wrong: 1.0, right: 2.0, usual: 3.0}

    def spoiled(self: Work, tile: Tile, copy: int = 0) -> torch.Tensor:
        out = attend(self, tile, copy)
        return out.mul_(1.001) if tile == wrong else out

    monkeypatch.setattr(Work, "attend", spoiled)
    monkeypatch.setattr(Work, "_on_the_clock", lambda self, tile: seconds[tile])
    found, journal = searched(tmp_path, [usual, wrong, impossible, right])
    assert Tile(**found["tile"]) == right and found["timed"] == 3
    assert found["ratio"] == pytest.approx(2 / 3, rel=1e-3)
    said = journal.values[f"failed: {KIND}: {search.label(wrong)}"]
    assert "outputs are off by 1.0e-03 from the usual tile's, limit 2e-05" in said
    assert "power of 2" in journal.values[f"failed: {KIND}: {search.label(impossible)}"]

    again, _ = searched(tmp_path, [usual, wrong, impossible, right])
    assert again["timed"] == 2 and Tile(**again["tile"]) == right

    # What is hardly faster is not worth it.
    seconds[right] = 2.98
    found, _ = searched(tmp_path, [usual, right])
    assert Tile(**found["tile"]) == usual and found["ratio"] == 1.0


def test_a_wrong_usual_tile_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    attend = Work.attend
    monkeypatch.setattr(Work, "attend", lambda *given: attend(*given).mul_(1.001))
    with pytest.raises(search.UsualTileError, match=r"off by 1\.0e-03 from the reference"):
        searched(tmp_path, [Tile(32, 16)])
    with pytest.raises(search.UsualTileError, match=r"rows 48, .* fails"):
        searched(tmp_path, [Tile(48, 16)])


def test_a_spoiled_device_ends_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And the tile that did it is not tried again."""
    usual, bad = Tile(32, 16), Tile(16, 16)
    attend = Work.attend

    def spoiling(self: Work, tile: Tile, copy: int = 0) -> torch.Tensor:
        if tile == bad:
            raise RuntimeError("CUDA error: an illegal memory access was encountered\nmore")
        return attend(self, tile, copy)

    monkeypatch.setattr(Work, "attend", spoiling)
    with pytest.raises(UserError, match=r"rows 16.*goes on without this tile"):
        searched(tmp_path, [usual, bad])
    found, _ = searched(tmp_path, [usual, bad])
    assert Tile(**found["tile"]) == usual and found["timed"] == 1


@pytest.mark.parametrize("name", ["softmax", "lssar", "selective", "forgetting"])
@pytest.mark.parametrize("phase", tuned.PHASES)
def test_outputs_are_compared_with_the_reference(name: str, phase: str) -> None:
    kind = KIND._replace(phase=phase, variant=name)
    work = Work(kind, CHECKED[phase], 2, "cpu")
    wanted = work.expected()
    assert wanted.dtype == torch.float64 and wanted.shape == (work.calls, *work.query.shape)
    outputs = work.outputs(Tile(16, 16))
    assert 0 < error_of(outputs, wanted) < 1e-5
    outputs[-1, -1] *= 1.001
    assert error_of(outputs, wanted) > 5e-4
    outputs[0, 0, 0, 0] = math.nan
    assert math.isnan(error_of(outputs, wanted))


def test_error_of_outputs_that_are_0() -> None:
    """As softpick's are where no score is positive."""
    nothing = torch.zeros(2, 3, 4)
    assert error_of(nothing, nothing) == 0
    assert error_of(nothing + 1e-9, nothing) == math.inf
    assert math.isnan(error_of(nothing / 0, nothing))


def test_caches_are_read_in_turn() -> None:
    """As many as the device's caches do not hold, in blocks of their own."""
    work = Work(KIND, Load(2, 5, 21), 2, "cpu", cold_bytes=50_000)
    one = 2 * 2 * 2 * 16 * 2 * 16 * 4  # requests, blocks, heads, tokens, key and value, float32
    assert work.copies == -(-50_000 // one) and work.kv.nbytes == work.copies * one
    assert sorted(work.tables.flatten().tolist()) == list(range(work.copies * 4))
    for copy in range(work.copies):
        work.fill(copy)
    outputs = [work.attend(Tile(16, 16), copy).clone() for copy in range(work.copies)]
    assert all(torch.equal(outputs[0], other) for other in outputs) and outputs[0].any()


def test_loads() -> None:
    for loads in (LOADS, TINY_LOADS):
        for phase, each in loads.items():
            for load in each:
                assert 1 <= load.new_tokens <= load.seq_len
                assert (load.new_tokens == 1) == (phase == DECODE)


@pytest.mark.integration
def test_processes_that_compile() -> None:
    """A tile that no compiler takes is said; what there is no time for is left out."""
    tasks = [Task(KIND, tile, 0) for tile in (Tile(16, 16), Tile(48, 16), Tile(32, 16))]
    with Compilers(PLACE, 1) as compilers:
        found = compilers.compile(tasks, time.monotonic() + 300)
        assert list(found) == tasks
        assert found[tasks[0]] == found[tasks[2]] == "" and "power of 2" in found[tasks[1]]
        assert compilers.compile(tasks, time.monotonic()) == {}


SCRIPT = """
import json, os, sys
from pathlib import Path

os.environ |= {"TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": sys.argv[1]}
import triton
from benchmarks.triton_compile.dry import DryCompiler, read_cubin
from attn_kernels.triton.tuned import Kind
from attn_kernels.triton.tuning import Tile
from attnserve.tune.compiling import Place, Task, compile_only, compiled

compiler = DryCompiler(Path(sys.argv[1]))
# Triton 3.6 cannot write down for a hook which functions it compiles with.
triton.knobs.runtime.jit_post_compile_hook = None
utils = triton.runtime.driver.active.utils
# As a driver counts spills: by 4 bytes.
utils.load_binary = lambda name, binary, *_: (1, 1, *counted(binary), 1024)


def counted(binary):
    registers, spilled, *_ = read_cubin({"cubin": binary})
    return registers, spilled // 4


found = []
properties = utils.get_device_properties(0)
for arch, size, tile, shared in (
    ("sm_80", 64, Tile(32, 32, 4, 2), 166912),
    ("sm_80", 128, Tile(128, 128, 4, 1), 166912),
    ("sm_90", 64, Tile(32, 32, 4, 2), 8192),  # which Triton asks a device for once
):
    properties["max_shared_mem"] = shared
    kind = Kind("prefill", "softmax", "bfloat16", "bfloat16", size, 4, 16)
    with compiler.target(arch):
        said = compiled(Task(kind, tile, 0), Place("cpu", 2, True))
    found.append([said, len(compile_only())])
print(json.dumps(found))
"""


@pytest.mark.integration
def test_what_does_not_fit_is_seen(tmp_path: Path) -> None:
    """Compiled for a GPU that is not here, and launched nowhere: registers and shared memory."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT, encoding="utf-8")
    environment = {**os.environ, tuned.VARIABLE: str(tmp_path / "none")}
    done = subprocess.run(
        [sys.executable, script, tmp_path / "cache"],
        capture_output=True, text=True, env=environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    (good, spilling, large) = json.loads(done.stdout.splitlines()[-1])
    assert good == ["", 1]
    assert spilling[0].startswith("spills ") and int(spilling[0].split()[1]) > 24
    assert "out of resource: shared memory" in large[0]
