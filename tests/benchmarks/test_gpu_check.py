"""`python -m benchmarks.gpu_check` without a GPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from attnserve.files import CHECKOUT
from benchmarks.gpu_check import SECONDS, Run, Stage, gpu_check
from tests.conftest import Commands

NO_GPU = pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="it is the refusal of a machine without a GPU, and here is one",
)


def summary(out: Path) -> dict[str, dict[str, Any]]:
    rows: list[dict[str, Any]] = json.loads((out / "summary.json").read_text())
    return {row["stage"]: row for row in rows}


@pytest.mark.integration
def test_dry_run(tmp_path: Path, commands: Commands) -> None:
    """A stage that takes too long is ended, and the others go on; each leaves its results."""
    arguments = ["--dry", f"--out={tmp_path}", "--jobs=1", "--seconds"]
    limits = ["correctness=2", "tune=400", "times=200", "packed=200"]
    stages = ["correctness", "tune", "times", "packed"]
    commands.run(gpu_check, *arguments, *limits, "--only", *reversed(stages), code=1)
    rows = summary(tmp_path)
    assert list(rows) == stages  # whatever the order they are named in
    late = rows["correctness"]
    assert late["late"] and late["exit code"] != 0 and 2 <= late["s"] < 20
    assert [rows[name]["exit code"] for name in stages[1:]] == [0, 0, 0]
    (table,) = (tmp_path / "tiles").glob("*.json")
    assert '"decode", "variant": "softpick"' in table.read_text()
    assert "softpick" in (tmp_path / "gpu.csv").read_text()
    assert "64x256 asymmetric" in (tmp_path / "gpu_packed.csv").read_text()
    assert "candidates compiled" in (tmp_path / "tune.log").read_text()

    commands.run(gpu_check, *arguments, "correctness=400", "--only", "correctness")
    assert " passed" in summary(tmp_path)["correctness"]["last line"]


@pytest.mark.slow
def test_dry_run_of_what_serves(tmp_path: Path, commands: Commands) -> None:
    limits = ["serving=600", "tokens=900"]
    arguments = ["--dry", f"--out={tmp_path}", "--only", "serving", "tokens", "--seconds", *limits]
    commands.run(gpu_check, *arguments)
    assert (tmp_path / "gpu_serving.csv").read_text().count("selective:8") == 3
    assert "2 passed" in summary(tmp_path)["tokens"]["last line"]


@NO_GPU
def test_no_gpu_is_one_line(commands: Commands, tmp_path: Path) -> None:
    said = commands.refused(gpu_check, f"--out={tmp_path / 'out'}")
    assert "finds no GPU; --dry tries the stages here" in said
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("text", ["tuning=3", "tune", "tune=long", "tune=0", "tune=nan"])
def test_wrong_limits_are_one_line(text: str, commands: Commands) -> None:
    assert f"--seconds {text}: give" in commands.refused(gpu_check, "--seconds", text)


def test_an_unknown_variant_is_one_line(commands: Commands) -> None:
    said = commands.refused(gpu_check, "--variants", "softpik")
    assert "unknown attention variant 'softpik'" in said


def test_fifteen_minutes() -> None:
    assert list(SECONDS) == list(Stage) and sum(SECONDS.values()) <= 15 * 60


def started(stage: Stage, out: Path, *more: str) -> subprocess.CompletedProcess[str]:
    """Run what a stage runs on a GPU."""
    setup = Run(out, False, 2, ("softpick", "lssar"), out / "candidates")
    return subprocess.run(
        [sys.executable, *setup.command(stage, 100.0), *more],
        cwd=CHECKOUT, capture_output=True, text=True,
        env={**setup.environment(), "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
    )  # fmt: skip


@NO_GPU
@pytest.mark.integration
@pytest.mark.parametrize("stage", [Stage.TUNE, Stage.TIMES, Stage.PACKED, Stage.SERVING], ids=str)
def test_a_gpu_is_all_that_they_lack(stage: Stage, tmp_path: Path) -> None:
    """Their commands are understood."""
    done = started(stage, tmp_path)
    assert done.returncode == 2 and "finds no GPU" in done.stderr


@pytest.mark.integration
@pytest.mark.parametrize(
    ("stage", "least"), [(Stage.CORRECTNESS, 500), (Stage.TOKENS, 10)], ids=str
)
def test_tests_are_found(stage: Stage, least: int, tmp_path: Path) -> None:
    done = started(stage, tmp_path, "--collect-only", "-q", "-n0")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    assert done.stdout.count("<Function ") >= least
