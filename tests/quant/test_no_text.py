"""The commands where there is no text, and with a user's own: nothing else is needed."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from attnserve.evaluation.checkpoint import digest
from quant import options, quantize, sweep
from quant.config import QuantConfig
from quant.report import __main__ as report
from quant.store import Stored, read_all
from quant.sweep_options import parser
from tests.quant.test_sweep import SMALL, refusal
from tests.tiny import LICENSE, tiny_checkpoint

Capture = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[2]
FEW = [*SMALL, "--what", "weights", "--schemes", "gptq", "--bits"]


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with nothing in it, in which the command runs."""
    folder = tmp_path / "empty"
    folder.mkdir()
    monkeypatch.chdir(folder)
    return folder


def results(folder: Path) -> dict[str, Stored]:
    return {f"{s.checkpoint} {s.config.name}": s for s in read_all(folder)}


def test_the_sweep_needs_nothing(
    softpick: Path, tmp_path: Path, empty: Path, capsys: Capture
) -> None:
    """Two checkpoints read what the softmax one writes. Rows come as cells are done."""
    softmax = tiny_checkpoint(
        tmp_path / "soft", "softmax", max_position_embeddings=64, num_hidden_layers=2
    )
    sweep.main([str(softpick), str(softmax), *FEW, "4"])
    output = capsys.readouterr()
    lines = output.out.splitlines()
    assert lines[0].startswith("Measured on: text sampled from soft. Calibrated on: text sampled")
    assert "Perplexity on it is the entropy of soft's own sampling" in lines[0]
    assert lines[1] == "4 configs to measure, 0 there already"
    head, *rows = lines[2:7]
    assert head.split("  ")[0] == "checkpoint" and head.endswith("same top-1, %")
    assert {row.split()[0] for row in rows[:2]} == {"softpick", "soft"}  # the unquantized ones
    assert all(row.split()[1] == "unquantized" for row in rows[:2])
    assert all("gptq, groups of 64" in row for row in rows[2:])
    assert all(row[head.index("KL") :][0].isdigit() for row in rows[2:])  # below their headings
    assert "Report: runs/quant/report.html" in lines
    page = (empty / "runs/quant/report.html").read_text()
    assert "Measured on: text sampled from soft." in page and "BLiMP" not in page
    found = results(Path("runs/quant"))
    assert set(found) == {
        f"{name} {config}"
        for name in ("softpick", "soft")
        for config in ("unquantized", "weights-gptq-w4-g64")
    }
    keys = {stored.key["texts"] for stored in found.values()}
    assert len(keys) == 1  # a hash of the tokens
    for stored in found.values():
        assert "perplexity: test per token" in stored.summary and "blimp" not in stored.units

    # What is there is shown again, and the report is found where the sweep left it.
    sweep.main([str(softpick), str(softmax), *FEW, "4"])
    again = capsys.readouterr().out.splitlines()
    assert again[1] == "0 configs to measure, 4 there already"
    assert sorted(again[3:7]) == sorted(rows)
    report.main([])
    assert "Report" not in capsys.readouterr().out


def test_text_from(softpick: Path, tmp_path: Path, empty: Path, capsys: Capture) -> None:
    """Another writer is another text: results are not mixed in silence."""
    other = tiny_checkpoint(tmp_path / "other", "ssmax", max_position_embeddings=64)
    sweep.main([str(softpick), *FEW, "4"])
    line = refusal(capsys, str(softpick), *FEW, "4", f"--text-from={other}")
    assert "holds a result that differs in texts (text sampled from softpick, text sampled" in line
    assert "now text sampled from other, text sampled from other): --force measures" in line
    sweep.main([str(softpick), *FEW, "4", f"--text-from={other}", "--out=elsewhere"])
    own, others = (results(Path(out)) for out in ("runs/quant", "elsewhere"))
    assert own.keys() == others.keys()
    name = "softpick weights-gptq-w4-g64"
    assert own[name].key["texts"] != others[name].key["texts"]


def test_one_file(softpick: Path, empty: Path, capsys: Capture) -> None:
    shutil.copy(LICENSE, "mine.txt")
    sweep.main([str(softpick), *FEW, "4", "--text", "mine.txt"])
    output = capsys.readouterr().out
    assert output.startswith("Measured on: mine.txt. Calibrated on: text sampled from softpick.\n")
    stored = results(Path("runs/quant"))["softpick weights-gptq-w4-g64"]
    assert stored.texts == {"measured": "mine.txt", "calibration": "text sampled from softpick"}
    Path("short.txt").write_text("Reader, I married him.")
    for text in ("--text", "--calibration-text"):
        line = refusal(capsys, str(softpick), *FEW, "4", text, "short.txt", "--out=other")
        assert line.startswith("python -m quant.sweep: short.txt has fewer than")
    assert not Path("other").exists()


def test_the_sets_alone(softpick: Path, data: Any, empty: Path, capsys: Capture) -> None:
    """WikiText-2, BLiMP and LAMBADA where they are named, beside sampled text."""
    sweep.main([str(softpick), *FEW, "4", f"--eval={data.evaluation}"])
    assert "BLiMP change, %" in capsys.readouterr().out
    stored = results(Path("runs/quant"))["softpick weights-gptq-w4-g64"]
    assert {"test KL", "wikitext2 KL", "blimp change", "lambada loss change"} <= set(stored.summary)
    assert "validation KL" not in stored.summary


def test_every_bundled_checkpoint_is_the_default(
    empty: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = {folder.name for folder in options.bundled_checkpoints()}
    assert {"softmax", "softpick"} <= names
    tasks = sweep.plan(parser("").parse_args([*SMALL, "--bits", "2", "3", "4", "8"]))
    assert {task.folder.name for task in tasks} == names
    assert len(tasks) == len(names) * (1 + 2 * 3 * 4 + 4)
    assert len({task.texts.key for task in tasks}) == 1
    assert tasks[0].texts.titles["measured"] == "text sampled from softmax"
    monkeypatch.setattr(options, "CHECKPOINTS", empty)  # as where pip has installed the package
    assert "name a checkpoint's folder: only a checkout" in refusal(capsys, *SMALL)


def test_committed_results_are_of_the_books() -> None:
    """They stay readable, and say what they were measured on."""
    for stored in read_all(ROOT / "quant" / "results"):
        assert stored.texts == {"measured": "test book", "calibration": "training books"}


def test_quantize(softpick: Path, empty: Path, capsys: Capture) -> None:
    quantize.main([str(softpick), "out", "--bits=3", "--scheme=gptq", "--length=48"])
    output = capsys.readouterr().out.splitlines()
    assert output[-2] == "Calibrated on: text sampled from softpick"
    assert json.loads(output[-1])["calibrated_on"] == "text sampled from softpick"
    assert "calibrated on: text sampled from softpick." in Path("out/README.md").read_text()
    before = digest(Path("out/model.safetensors"))
    argv = [str(softpick), "out", "--bits=3", "--scheme=gptq", "--length=48", "--overwrite"]
    quantize.main(argv)
    assert digest(Path("out/model.safetensors")) == before
    shutil.copy(LICENSE, "mine.txt")
    capsys.readouterr()
    quantize.main([*argv, "--calibration-text", "mine.txt"])
    assert "Calibrated on: mine.txt" in capsys.readouterr().out
    assert digest(Path("out/model.safetensors")) != before
    quantize.main([str(softpick), "rtn", "--bits=3", "--scheme=rtn"])
    line = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert line["calibrated_on"] is None


def test_quantize_gives_the_sweeps_weights(softpick: Path, empty: Path) -> None:
    """Both calibrate on the same text, where none is named."""
    parsed = quantize.parser().parse_args([str(softpick), "o", "--bits=4", "--scheme=gptq"])
    _, texts = quantize.calibration(parsed)
    line = [str(softpick), "--what", "weights", "--schemes", "gptq"]
    task = sweep.plan(parser("").parse_args(line))[-1]
    assert task.config == QuantConfig(weights=8, scheme="gptq", group_size=64)
    assert texts.tolist() == task.texts.calibration.rows(0).tolist()


@pytest.mark.parametrize("module", ["quant.quantize", "quant.options", "quant"])
def test_imports(module: str) -> None:
    """No command of few steps waits for libraries of tables and plots."""
    code = (
        f"import sys, {module}; print({{'pandas', 'matplotlib', 'benchmarks'}} & {{*sys.modules}})"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout.strip()) == (0, "set()"), done.stderr


def test_the_list_of_commands() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "quant"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for command in ("sweep", "quantize", "sensitivity", "report"):
        (line,) = [row for row in done.stdout.splitlines() if f"-m quant.{command} " in row]
        assert len(line.split()) > 6
    assert subprocess.run([sys.executable, "-m", "quant", "sweeep"], cwd=ROOT).returncode == 2


def test_bundled_checkpoints_read_the_same_text_alone() -> None:
    nothing_named = parser(None).parse_args([])
    for folder in options.bundled_checkpoints():
        (sources,) = options.sources_of(nothing_named, [folder]).values()
        assert sources.writer == options.CHECKPOINTS / "softmax"
