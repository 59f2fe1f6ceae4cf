"""The commands where there is no text, and with a user's own: nothing else is needed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnserve.evaluation.checkpoint import Checkpoint, digest
from quant import runner, texts
from quant.config import QuantConfig, Samples, SearchSpace
from quant.quantize import quantize
from quant.report.__main__ import report
from quant.store import SweepResult, read_all
from quant.sweep import sweep
from quant.texts import Sources, bundled_checkpoints, calibration_text
from tests.conftest import Commands
from tests.quant.conftest import SMALL
from tests.tiny import LICENSE, tiny_checkpoint

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parents[2]
FEW = [*SMALL, "--what", "weights", "--schemes", "gptq", "--bits"]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return a folder with nothing in it, in which the command runs."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def results(folder: Path) -> dict[str, SweepResult]:
    return {f"{s.checkpoint} {s.config.name}": s for s in read_all(folder)}


def test_the_sweep_needs_nothing(
    softpick: Path, tmp_path: Path, empty: Path, commands: Commands
) -> None:
    """Two checkpoints read what the softmax one writes. Rows come as configs are done."""
    softmax = tiny_checkpoint(
        tmp_path / "soft", "softmax", max_position_embeddings=64, num_hidden_layers=2
    )
    lines = commands.run(sweep, softpick, softmax, *FEW, "4").splitlines()
    assert lines[0].startswith("Measured on: text sampled from soft. Calibrated on: text sampled")
    assert "Perplexity on it is the entropy of soft's own sampling" in lines[0]
    assert lines[1] == "4 configs to measure, 0 there already"
    head, *rows = lines[2:7]
    assert head.split("  ")[0] == "checkpoint" and head.endswith("same top-1, %")
    assert {row.split()[0] for row in rows[:2]} == {"softpick", "soft"}  # the unquantized ones
    assert all(row.split()[1] == "unquantized" for row in rows[:2])
    assert all("gptq, groups of 64, act-order, searched ranges" in row for row in rows[2:])
    assert all(row[head.index("KL") :][0].isdigit() for row in rows[2:])  # below their headings
    assert "Report: runs/quant/report.html" in lines
    page = (empty / "runs/quant/report.html").read_text()
    assert "Measured on: text sampled from soft." in page and "BLiMP" not in page
    found = results(Path("runs/quant"))
    assert set(found) == {
        f"{name} {config}"
        for name in ("softpick", "soft")
        for config in ("unquantized", "weights-gptq-w4-g64-actorder-search")
    }
    keys = {stored.key["texts"] for stored in found.values()}
    assert len(keys) == 1  # a hash of the tokens
    for stored in found.values():
        assert "perplexity: test per token" in stored.summary and "blimp" not in stored.units

    # What is there is shown again, and the report is found where the sweep left it.
    again = commands.run(sweep, softpick, softmax, *FEW, "4").splitlines()
    assert again[1] == "0 configs to measure, 4 there already"
    assert sorted(again[3:7]) == sorted(rows)
    assert "Report: runs/quant/report.html" in commands.run(report)


def test_text_from(softpick: Path, tmp_path: Path, empty: Path, commands: Commands) -> None:
    """Another writer is another text: results are not mixed in silence."""
    other = tiny_checkpoint(tmp_path / "other", "ssmax", max_position_embeddings=64)
    commands.run(sweep, softpick, *FEW, "4")
    line = commands.refused(sweep, softpick, *FEW, "4", f"--text-from={other}")
    assert "holds a result that differs in texts (text sampled from softpick, text sampled" in line
    assert "now text sampled from other, text sampled from other): --force measures" in line
    commands.run(sweep, softpick, *FEW, "4", f"--text-from={other}", "--out=elsewhere")
    own, others = (results(Path(out)) for out in ("runs/quant", "elsewhere"))
    assert own.keys() == others.keys()
    name = "softpick weights-gptq-w4-g64-actorder-search"
    assert own[name].key["texts"] != others[name].key["texts"]


def test_one_file(softpick: Path, empty: Path, commands: Commands) -> None:
    shutil.copy(LICENSE, "mine.txt")
    output = commands.run(sweep, softpick, *FEW, "4", "--text", "mine.txt")
    assert output.startswith("Measured on: mine.txt. Calibrated on: text sampled from softpick.\n")
    stored = results(Path("runs/quant"))["softpick weights-gptq-w4-g64-actorder-search"]
    assert stored.texts == {"measured": "mine.txt", "calibration": "text sampled from softpick"}
    Path("short.txt").write_text("Reader, I married him.")
    for text in ("--text", "--calibration-text"):
        line = commands.refused(sweep, softpick, *FEW, "4", text, "short.txt", "--out=other")
        assert "short.txt has fewer than" in line
    assert not Path("other").exists()


def test_the_sets_alone(softpick: Path, data: Any, empty: Path, commands: Commands) -> None:
    """WikiText-2, BLiMP and LAMBADA where they are named, beside sampled text."""
    output = commands.run(sweep, softpick, *FEW, "4", f"--eval={data.evaluation}")
    assert "BLiMP change, %" in output
    stored = results(Path("runs/quant"))["softpick weights-gptq-w4-g64-actorder-search"]
    assert {"test KL", "wikitext2 KL", "blimp change", "lambada loss change"} <= set(stored.summary)
    assert "validation KL" not in stored.summary


def test_every_bundled_checkpoint_is_the_default(
    empty: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = bundled_checkpoints()
    assert {"softmax", "softpick"} <= {folder.name for folder in folders}
    samples = Samples(2, 48, 2, 2, 2)
    tasks = runner.plan(folders, SearchSpace().configs(), samples, Sources(), empty)
    assert {task.folder for task in tasks} == set(folders)
    assert len(tasks) == len(folders) * (1 + 2 * 4 * 4 + 4 + 1)
    assert len({task.texts.key for task in tasks}) == 1
    assert tasks[0].texts.titles["measured"] == "text sampled from softmax"
    monkeypatch.setattr(texts, "CHECKPOINTS", empty)  # as where pip has installed the package
    assert "name a checkpoint's folder: only a checkout" in commands.refused(sweep, *SMALL)


def test_committed_results_are_of_the_books() -> None:
    """They stay readable, and say what they were measured on."""
    for stored in read_all(ROOT / "quant" / "results"):
        assert stored.texts == {"measured": "test book", "calibration": "training books"}


def test_quantize(softpick: Path, empty: Path, commands: Commands) -> None:
    argv = [softpick, "out", "--bits=3", "--scheme=gptq", "--length=48"]
    output = commands.run(quantize, *argv).splitlines()
    assert output[-1] == "Calibrated on: text sampled from softpick"
    assert "calibrated on: text sampled from softpick." in Path("out/README.md").read_text()
    before = digest(Path("out/model.safetensors"))
    line = json.loads(commands.run(quantize, *argv, "--overwrite", "--json"))
    assert line["calibrated_on"] == "text sampled from softpick"
    assert digest(Path("out/model.safetensors")) == before
    shutil.copy(LICENSE, "mine.txt")
    mine = ["--overwrite", "--calibration-text", "mine.txt"]
    assert "Calibrated on: mine.txt" in commands.run(quantize, *argv, *mine)
    assert digest(Path("out/model.safetensors")) != before
    line = json.loads(commands.run(quantize, softpick, "rtn", "--bits=3", "--scheme=rtn", "--json"))
    assert line["calibrated_on"] is None


def test_quantize_gives_the_sweeps_weights(softpick: Path, empty: Path) -> None:
    """Both calibrate on the same text, where none is named."""
    configs = SearchSpace(["weights"], schemes=["gptq"]).configs()
    task = runner.plan([softpick], configs, Samples(2, 48, 2, 2, 4), Sources(), empty)[-1]
    assert task.config == QuantConfig(
        weights=8, scheme="gptq", group_size=64, act_order=True, search=True
    )
    text = calibration_text(Sources(writer=softpick), Checkpoint(softpick, longest=48), 4, seed=0)
    assert text == task.texts.calibration


@pytest.mark.parametrize("command", ["sweep", "quantize", "sensitivity", "report"])
def test_help_waits_for_nothing(command: str) -> None:
    """A command's module imports nothing that takes long."""
    module = "quant.report.__main__" if command == "report" else f"quant.{command}"
    heavy = {"torch", "transformers", "pandas", "matplotlib", "numpy"}
    code = f"import sys, {module}; print({heavy} & {{*sys.modules}})"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


def test_the_list_of_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quant"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for command in ("sweep", "quantize", "sensitivity", "report"):
        (line,) = [row for row in done.stdout.splitlines() if row.startswith(f"  {command} ")]
        assert len(line.split()) > 6
    assert subprocess.run([sys.executable, "-m", "quant", "sweeep"], cwd=ROOT).returncode == 2


def test_bundled_checkpoints_read_the_same_text_alone() -> None:
    for folder in bundled_checkpoints():
        (sources,) = Sources().for_checkpoints([folder]).values()
        assert sources.writer == texts.CHECKPOINTS / "softmax"
