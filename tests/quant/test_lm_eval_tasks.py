"""lm-eval's tasks in the sweep, on texts of our own."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path

import pytest

from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.measures import Data
from attnserve.evaluation.scorers import Item, TransformersScorer
from quant import lm_eval_tasks
from quant.config import QuantConfig
from quant.schemes.registry import installed
from quant.store import path_of, read
from quant.sweep import sweep
from tests.conftest import Commands
from tests.quant.conftest import SMALL

HERE = installed("lm_eval")
needs_lm_eval = pytest.mark.skipif(
    not HERE, reason="lm_eval is not installed: pip install -e '.[lm-eval]'"
)

PAIRS = [
    ("It was the best of times", "times best the of was It"),
    ("She said nothing", "nothing she She said said"),
    ("He went home", "home home He"),
]
TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: {kind}
doc_to_text: ""
"""
CHOICE = """
doc_to_target: 0
target_delimiter: ""
doc_to_choice: "{{[good, bad]}}"
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
ROLLING = """
doc_to_target: "{{good}}"
metric_list: [{metric: word_perplexity, aggregation: weighted_perplexity, higher_is_better: false}]
"""


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    """Return a folder with tasks: choices, whole texts, a task that writes, data elsewhere."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    file = folder / "pairs.jsonl"
    file.write_text("".join(json.dumps({"good": g, "bad": b}) + "\n" for g, b in PAIRS))
    kinds = {
        "pairs": ("multiple_choice", CHOICE),
        "texts": ("loglikelihood_rolling", ROLLING),
        "writes": ("generate_until", 'doc_to_target: "{{good}}"\n'),
    }
    for name, (kind, rest) in kinds.items():
        text = TASK.format(name=name, file=file, kind=kind) + rest
        (folder / f"{name}.yaml").write_text(text)
    away = (folder / "pairs.yaml").read_text().replace("path: json", "path: nobody/nothing")
    (folder / "away.yaml").write_text(away.replace("task: pairs", "task: away"))
    return folder


def options(checkpoint: Path, data: Data, out: Path, *more: str) -> list[str]:
    argv = [str(checkpoint), *SMALL, f"--books={data.books}", f"--eval={data.evaluation}"]
    return [*argv, f"--out={out}", "--what=kv", "--bits=8", *more]


@needs_lm_eval
def test_tasks_in_cells(
    softpick: Path, data: Data, tasks: Path, tmp_path: Path, commands: Commands
) -> None:
    """Figures are those of the texts' log-probabilities, computed without lm-eval."""
    argv = options(softpick, data, tmp_path, f"--lm-eval-include={tasks}")
    commands.run(sweep, *argv, "--lm-eval", "pairs", "texts")
    checkpoint, scorer = Checkpoint(softpick), TransformersScorer(softpick, quiet=True)
    items = [Item([checkpoint.bos], checkpoint.encode(text)) for pair in PAIRS for text in pair]
    totals = [scored.total for scored in scorer.score(items, "")]
    hits = [float(good > bad) for good, bad in zip(totals[::2], totals[1::2], strict=True)]
    words = sum(len(good.split()) for good, _ in PAIRS)
    plain = read(path_of(tmp_path, "softpick", QuantConfig()))
    assert plain.units["lm-eval"]["pairs"]["acc"] == hits
    assert plain.summary["lm-eval: pairs acc"].value == pytest.approx(sum(hits) / 3)
    perplexity = plain.summary["lm-eval: texts word_perplexity"]
    assert perplexity.value == pytest.approx(math.exp(-sum(totals[::2]) / words), rel=1e-4)
    quantized = read(path_of(tmp_path, "softpick", QuantConfig(kv=8)))
    assert -1 <= quantized.summary["lm-eval: pairs acc change"].value <= 1
    assert quantized.summary["lm-eval: texts word_perplexity"].value != perplexity.value

    # Results with and without lm-eval are not taken for one another.
    assert "holds a result that differs in lm-eval" in commands.refused(sweep, *argv[:-1])
    # Of other documents, neither: another process would read them again.
    pairs = tasks / "pairs.jsonl"
    pairs.write_text(pairs.read_text().replace("best", "worst"))
    for cached in (lm_eval_tasks.load, lm_eval_tasks.key):
        cached.cache_clear()
    line = commands.refused(sweep, *argv, "--lm-eval", "pairs", "texts")
    assert "holds a result that differs in lm-eval" in line


@needs_lm_eval
@pytest.mark.parametrize(
    ("task", "message"),
    [
        ("nothing_such", "lm-eval has no task 'nothing_such'"),
        ("away", "lm-eval cannot load away from local data"),
        ("writes", "lm-eval's writes lets the model write (generate_until)"),
    ],
)
def test_refused_tasks(
    task: str, message: str, softpick: Path, data: Data, tasks: Path, tmp_path: Path,
    commands: Commands,
) -> None:  # fmt: skip
    argv = options(softpick, data, tmp_path, f"--lm-eval-include={tasks}", "--lm-eval", task)
    refused(argv, message, tmp_path, commands)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        pytest.param(
            "--lm-eval blimp", "--lm-eval needs the library lm_eval, which is not installed",
            marks=pytest.mark.skipif(HERE, reason="lm_eval is installed"),
        ),
        pytest.param(
            "--lm-eval blimp --lm-eval-include nowhere", "nowhere is no folder",
            marks=needs_lm_eval,
        ),
        ("--lm-eval-limit 3", "--lm-eval-include and --lm-eval-limit need tasks"),
    ],
)  # fmt: skip
def test_refused_settings(
    arguments: str, message: str, softpick: Path, data: Data, tmp_path: Path, commands: Commands
) -> None:
    refused(options(softpick, data, tmp_path, *arguments.split()), message, tmp_path, commands)


@needs_lm_eval
def test_data_must_be_local(
    softpick: Path, data: Data, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE")
    argv = options(softpick, data, tmp_path, "--lm-eval", "hellaswag")
    refused(argv, "set HF_HUB_OFFLINE=1", tmp_path, commands)
    assert "HF_HUB_OFFLINE" not in os.environ


def refused(argv: list[str], message: str, out: Path, commands: Commands) -> None:
    """In the last line, before any work."""
    assert message in commands.refused(sweep, *argv)
    assert not (out / "configs").exists()
