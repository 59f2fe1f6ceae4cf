"""`python -m training.compare` on tiny models: what is on the page, kept, refused, and failed."""

from __future__ import annotations

import csv
import errno
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from attnserve.evaluation import tiled
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.intervals import Estimate
from attnserve.evaluation.measures import Data
from attnserve.evaluation.scorers import load_llama
from attnserve.reports import table
from tests.conftest import Commands
from tests.tiny import LICENSE, tiny_checkpoint, write_tiny_llama
from tests.training.texts import Copier, write_texts
from training.analyze import run
from training.analyze.attention import Attention
from training.analyze.settings import AnalysisSettings
from training.compare import effort, stages
from training.compare.__main__ import compare
from training.report.changes import Better, Change

CONTEXT = 224
FIELDS = {"max_position_embeddings": CONTEXT, "num_hidden_layers": 2, "hidden_size": 64}
TINY = replace(
    effort.QUICK,
    limits=dict.fromkeys(effort.QUICK.limits, 2),
    sequence=64,
    bits=(4,),
    quantized=2,
    quantized_length=32,
    pruning=(32,),
    pruned=(2, 2, 2),
    uniform=(8, 16),
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Return random models: the softmax original, softpick and selective."""
    folder = tmp_path_factory.mktemp("models")
    names = ("softmax", "softpick", "selective")
    return [str(tiny_checkpoint(folder / name, name, **FIELDS)) for name in names]


@pytest.fixture
def argv(folders: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a command line whose --quick is tiny."""
    monkeypatch.setattr(effort, "QUICK", TINY)
    monkeypatch.setenv("ATTNSERVE_CACHE", str(tmp_path / "cache"))
    evaluation = write_texts(tmp_path)[1]
    options = [f"--text={LICENSE}", f"--eval={evaluation}", f"--out={tmp_path / 'out'}"]
    return [*folders, *options, "--quick", "--jobs=1", "--max-length=448", "--json"]


def test_the_page(argv: list[str], tmp_path: Path, commands: Commands,
                  monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    printed = json.loads(commands.run(compare, *argv, "--seen=yes."))
    assert printed["failed"] == {} and set(printed["changes"]) == {"softpick", "selective"}
    text = (tmp_path / "out" / "page.md").read_text()
    assert text.startswith("<!--") and "had seen that text in training: yes." in text
    for name in ("attention", "length", "passkey", "pruning", "quantization-weights"):
        assert f"](figures/{name}.png)" in text
        assert (tmp_path / "out" / "figures" / f"{name}.png").stat().st_size > 1000
    assert "### softpick: Softpick (arXiv 2504.20966)" in text
    assert "### selective: Selective attention (arXiv 2410.02703)" in text
    assert "LSSAR" not in text and "None" not in text and "nan" not in text
    assert "served memory and throughput: they need --serve" in text
    assert "- quantization by gptq\n" in text and "- quantization of kv\n" in text
    assert "- quantization to bits: 2, 3, 5, 6, 8\n" in text
    assert "- budgets of selective at 512 tokens: the training length is 224\n" in text
    assert "searched by one threshold of masking for all layers on 32 sequences of the" in text
    changes = printed["changes"]["softpick"]
    assert "loss at 2x the training length, nats per token" in changes
    assert any("weights in 4 bits (hqq" in what for what in changes)
    for name, verdicts in printed["changes"].items():
        assert {"BLiMP accuracy", "kurtosis, times"} < set(verdicts), name

    # What is there is not measured again; what failed is named, and does not stop the rest.
    (tmp_path / "out" / "analysis" / "softpick" / "passkey.json").unlink()
    monkeypatch.setattr(stages, "pruning", None)
    analysis = tmp_path / "out" / "analysis"
    before = {file: file.stat().st_mtime_ns for file in analysis.glob("*/*.json")}
    printed = json.loads(commands.run(compare, *argv, code=1))
    assert list(printed["failed"]) == ["budgets of selective at 32 tokens"]
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert (analysis / "softpick" / "passkey.json").exists()
    again = (tmp_path / "out" / "page.md").read_text()
    assert "- budgets of selective at 32 tokens: 'NoneType' object has no attribute" in again
    assert "No results of `attnserve budgets`." in again
    assert "not said (--seen)." in again


@pytest.mark.slow
@pytest.mark.integration
def test_served(argv: list[str], tmp_path: Path, commands: Commands,
                monkeypatch: pytest.MonkeyPatch) -> None:  # fmt: skip
    """Each pair is served, the selective one within the budgets that were found, too."""
    monkeypatch.setattr(effort, "QUICK", replace(TINY, requests=4, rounds=1))
    assert json.loads(commands.run(compare, *argv, "--serve"))["failed"] == {}
    files = list((tmp_path / "out" / "served").glob("*.csv"))
    assert {file.name.partition("-")[0] for file in files} == {"softpick", "selective"}
    rows = [row for file in files for row in csv.DictReader(file.open())]
    assert all(float(row["tokens_per_s"]) > 0 for row in rows)
    assert "| pair | server | KV cache, MB |" in (tmp_path / "out" / "page.md").read_text()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (["--text=nowhere.txt"], "nowhere.txt is not there: name a text file"),
        (["--text={short}"], "short.txt has 3 tokens, fewer than two sequences of 64"),
        (["--calibration-text={short}"], "short.txt has 3 tokens, fewer than two sequences of 64"),
        (["{packed}"], "packed is quantized already: name the checkpoint"),
        (["--sequence=32"], "holds a result with another context"),
        (["--device=tpu"], "there is no device tpu: leave out --device"),
        (["{softpick}"], "two checkpoints are called softpick"),
        (["{llama}"], "differ in their tokenizers"),
    ],
)
def test_what_cannot_be_is_one_line(
    change: list[str], message: str, argv: list[str], tmp_path: Path, commands: Commands
) -> None:
    if "--sequence" in change[0]:
        settings = AnalysisSettings(limit=2, context=64, out=tmp_path / "out" / "analysis")
        run.analyze(Path(argv[0]), ["perplexity"], Data(text=LICENSE), settings)
    if "llama" in change[0]:
        write_tiny_llama(tmp_path / "llama")
    (tmp_path / "short.txt").write_text("a\nb")
    if "packed" in change[0]:
        shutil.copytree(argv[1], tmp_path / "packed")
        config = tmp_path / "packed" / "config.json"
        entry = {"quantization_config": {"quant_method": "gptq"}}
        config.write_text(json.dumps(json.loads(config.read_text()) | entry))
    names = {name: tmp_path / name for name in ("llama", "packed")}
    given = [one.format(softpick=argv[1], short=tmp_path / "short.txt", **names) for one in change]
    assert message in commands.refused(compare, *argv, *given)
    assert not (tmp_path / "out" / "page.md").exists()


def test_the_original_is_softmax(argv: list[str], commands: Commands) -> None:
    line = commands.refused(compare, *argv[1:])
    assert "has softpick attention: name the softmax original first" in line


def test_maps_of_a_plain_llama_are_taken_in_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The figures are those of whole maps, and no tile is as large as a map."""
    monkeypatch.setattr(tiled, "TILE_SCORES", 997)
    folder = write_tiny_llama(tmp_path)
    checkpoint = Checkpoint(folder, 96)
    seen: list[int] = []
    model = load_llama(folder)
    tiled.attend_in_tiles(model, lambda weights: seen.append(weights.shape[-2]))
    ids = torch.tensor([[0, *checkpoint.encode(LICENSE.read_text())[:95]]])
    with torch.no_grad():
        logits = model(ids, use_cache=False).logits
        plain = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
        whole = plain(ids, use_cache=False, output_attentions=True)
    np.testing.assert_allclose(logits, whole.logits, atol=2e-4)
    assert sum(seen) == 2 * 96 and max(seen) < 96
    first = torch.stack(whole.attentions)[:, 0, :, :, 0].mean(-1)
    one = Attention(sequences=1).run(checkpoint, Data(text=LICENSE), Copier())
    np.testing.assert_allclose(one.units["head_first_column"], first, atol=2e-5)


def test_verdicts() -> None:
    one = Estimate(1.0, 0.9, 1.1)

    def verdict(change: Estimate, better: Better = "", is_ratio: bool = False) -> str:
        return Change("it", (one, one), change, better, is_ratio).verdict

    assert verdict(Estimate(0.1, -0.1, 0.3)) == "no difference shown"
    assert verdict(Estimate(0.1, 0.05, 0.3)) == "higher"
    assert verdict(Estimate(-0.1, -0.2, -0.05), "lower") == "lower: better"
    assert verdict(Estimate(-0.1, -0.2, -0.05), "higher") == "lower: worse"
    assert verdict(Estimate(1.1, 0.9, 1.3), "lower", True) == "no difference shown"
    assert verdict(Estimate(2.0, 1.1, 3.0), "lower", True) == "higher: worse"
    none = Estimate(math.nan, math.nan, math.nan)  # of a model that overflows
    assert verdict(none, "lower") == verdict(none, "higher", True) == "no difference shown"


def test_a_full_disk_ends_it(
    argv: list[str], tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What follows could not be kept either."""

    def full(*args: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(stages, "analyze", full)
    line = commands.refused(compare, *argv)
    assert "out has no room for results (No space left on device): make some" in line


def test_texts_too_short_for_the_longest_budgets(folders: list[str], tmp_path: Path) -> None:
    """They are named on the page, which is written all the same."""
    original, own = Checkpoint(Path(folders[0]), 8192), Checkpoint(Path(folders[2]), 8192)
    long = replace(TINY, pruning=(8192,))
    c = stages.Comparison(
        original, [own], Data(text=LICENSE), None, 8192, long, "cpu", 1, False, tmp_path
    )
    stages.prune(c)
    why = "first half of LICENSE has fewer than two sequences of 8192 tokens"
    assert f"budgets of selective at 8192 tokens: {why}" in c.left_out
    assert "budgets of selective at 512 tokens: not with --quick" in c.left_out
    assert not c.failures and not c.budgets


def test_a_table_of_names_with_bars() -> None:
    assert table(["", "a | b"], [["c|d", "1"]]).splitlines()[::2] == [
        r"|  | a \| b |",
        r"| c\|d | 1 |",
    ]
