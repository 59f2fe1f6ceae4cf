"""Tables of tiles compile within limits: those of the package, and a check that it would be seen if
they did not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attn_kernels.triton import tuned
from attn_kernels.triton.tuning import DECODE, PREFILL, Tile
from attnserve.tune.candidates import candidates, kinds_of, listed

pytestmark = pytest.mark.integration


def compiled(*tables: Path) -> tuple[int, dict[str, Any]]:
    """Return the command's exit code and what it prints."""
    command = [sys.executable, "-m", "benchmarks.triton_compile.tables", "--json"]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}  # which it must not heed
    done = subprocess.run(
        [*command, *map(str, tables)], capture_output=True, text=True, env=environment
    )
    assert done.stdout, done.stderr[-3000:]
    return done.returncode, json.loads(done.stdout)


def test_tables_of_the_package() -> None:
    tables = sorted(tuned.PACKAGED.glob("*.json"))
    if not tables:
        pytest.skip("no table is in the package: `attnserve tune` has not run on a GPU yet")
    code, found = compiled(*tables)
    wrong = [row for row in found["rows"] if row["error"] or row["violation"]]
    assert (code, wrong) == (0, [])
    kinds = {str(kind) for table in tables for kind in tuned.read(table)[1]}
    assert {row["kind"] for row in found["rows"]} == kinds


def test_bad_entries_are_seen(tmp_path: Path) -> None:
    """One that spills and one of an unknown variant, beside a good one in each phase."""
    good = tuned.Kind(PREFILL, "softpick", "bfloat16", "bfloat16", 64, 4, 16)
    tiles = {
        good: Tile(32, 32, 4, 2),
        good._replace(phase=DECODE): Tile(16, 32, 4, 2),
        good._replace(head_size=128): Tile(128, 128, 4, 1),
        good._replace(variant="hardpick"): Tile(32, 32, 4, 2),
    }
    table = tmp_path / "sm_80.json"
    table.write_text(tuned.text_of("sm_80", tiles))
    code, found = compiled(table)
    assert code == 1 and found["wrong"] >= 2
    said: dict[str, list[str]] = {}
    for row in found["rows"]:
        said.setdefault(row["kind"], []).append(row["error"] or row["violation"])
    wanted = ("", "", "spills", "hardpick")
    for kind, part in zip(tiles, wanted, strict=True):
        assert all(part in line if part else not line for line in said[str(kind)]), said[str(kind)]


def test_candidates_are_listed(tmp_path: Path) -> None:
    """Those that fit, the fewest instructions first; what is listed is not compiled again."""
    out = tmp_path / "list.jsonl"
    command = [sys.executable, "-m", "benchmarks.triton_compile.candidates", f"--out={out}"]
    command += ["--arch=sm_80", "--variants", "softpick", "--head-sizes", "64", "--most=3"]
    for phases in (["decode"], ["decode", "short-prefill"]):
        done = subprocess.run([*command, "--phases", *phases], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr[-3000:]
        assert done.stderr.count(" of 3 fit") == 1
    found = listed(out, "sm_80")
    kinds = kinds_of(phases=phases, variants=["softpick"], head_sizes=[64])
    assert list(found) == [str(kind) for kind in kinds]
    for kind in kinds:
        assert 1 <= len(found[str(kind)]) <= 3
        assert set(found[str(kind)]) <= set(candidates(kind, "sm_80")[:3])


def test_an_unknown_architecture_is_one_line(tmp_path: Path) -> None:
    table = tmp_path / "sm_70.json"
    table.write_text(tuned.text_of("sm_70", {}))
    command = [sys.executable, "-m", "benchmarks.triton_compile.tables", str(table)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert f"{table}: arch: 'sm_70' is none of sm_80" in line
