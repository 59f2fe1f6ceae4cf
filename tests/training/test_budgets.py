"""The search for budgets: what it measures, what it chooses, and that it goes on where it was."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from attn_kernels import Rows, get_variant
from attn_kernels import variant as registry
from attn_kernels.pruning import attend_pruned
from attn_kernels.variant import LEAST_BUDGET
from attn_kernels.variants.selective import Selective
from attnserve.budgets import model as model_module
from attnserve.budgets import run as run_module
from attnserve.budgets.command import budgets
from attnserve.budgets.model import Budgets, Forward, Measured
from attnserve.budgets.result import FOLDER, Found
from attnserve.budgets.run import BUNDLED
from attnserve.budgets.search import FREE, THRESHOLDS, Descent, search
from attnserve.budgets.texts import parts_of
from attnserve.errors import UserError
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.scorers import Item, TransformersScorer
from attnserve.evaluation.texts import Text, evenly, read
from tests.conftest import Commands
from tests.tiny import LICENSE, tiny_checkpoint
from tests.training.test_eviction import page

LENGTH = 24
FULL = (LENGTH,) * 3


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Random checkpoints of three layers, whose head 0 looks far enough to mask tokens."""
    folder = tmp_path_factory.mktemp("checkpoints")
    names = ("selective", "softmax", "softpick")
    return {name: tiny_checkpoint(folder / name, name) for name in names}


def measured(folder: Path, books: Path, runs: Path, sequences: int = 5) -> Measured:
    forward = Forward(Checkpoint(folder))
    return Measured(forward, of_file(forward.checkpoint, books / "emma.txt", sequences), runs)


def of_file(checkpoint: Checkpoint, file: Path, sequences: int) -> Text:
    tokens = checkpoint.encode(read(file))
    return evenly(file.stem, checkpoint.bos, [tokens], sequences, LENGTH, last=False)


def of_transformers(folder: Path, own: Measured) -> list[float]:
    """Each sequence's loss as transformers computes it."""
    items = [Item([own.checkpoint.bos], row) for row in own.text.sequences]
    scores = TransformersScorer(folder, quiet=True).score(items, "")
    return [-scored.total / LENGTH for scored in scores]


def test_softmax_of_changed_queries_is_the_model(
    books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a learned tensor and without the model's scale: fused attention knows neither."""

    class Changed(Selective):
        uses_scale: ClassVar[bool] = False
        learned: ClassVar[tuple[str, ...]] = ("factor",)

        def initial(self, learned_name: str) -> float:
            return 0.4

        def transform(self, q: Tensor, k: Tensor, rows: Rows) -> tuple[Tensor, Tensor]:
            return q * rows.learned["factor"], k

    monkeypatch.setattr(registry, "_REGISTRY", registry._REGISTRY | {"selective": Changed})
    own = measured(tiny_checkpoint(tmp_path / "model", "selective"), books, tmp_path)
    wanted = of_transformers(tmp_path / "model", own)
    assert own.losses("none", FULL) == pytest.approx(wanted, abs=1e-4)


def test_sliding_windows_are_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "softmax", sliding_window=8)
    with pytest.raises(UserError, match="has a sliding window"):
        Forward(Checkpoint(folder))


@pytest.mark.parametrize("name", ["selective", "softmax"])
def test_unpruned_is_the_model(
    name: str, folders: dict[str, Path], books: Path, tmp_path: Path
) -> None:
    own = measured(folders[name], books, tmp_path)
    # F is rounded to 2^-16.
    assert own.losses("none", FULL) == pytest.approx(of_transformers(folders[name], own), abs=1e-4)


def test_pruned_is_the_reference(
    folders: dict[str, Path], books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The whole model with `attend_pruned` in place of attention under a mask, to the bits of
    float32: no other token was thrown out."""
    budgets = (9, 2, 14)
    own = measured(folders["selective"], books, tmp_path)
    found = own.losses("selective", budgets)
    unpruned = own.losses("none", FULL)
    left = iter(budgets)

    def expected(q: Tensor, k: Tensor, v: Tensor, *, scale: float, **_: Any) -> Tensor:
        budget = next(left)
        pairs = zip(q, k, v, strict=True)
        return torch.stack(
            [
                attend_pruned(get_variant("selective"), *qkv, page(budget, qkv[1]), 0, scale)
                for qkv in pairs
            ]
        )

    monkeypatch.setattr(model_module, "scaled_dot_product_attention", expected)
    assert own.forward(own.text, FULL, "selective") == pytest.approx(found, rel=1e-5)
    assert next(left, None) is None
    assert found != pytest.approx(unpruned, rel=1e-3)


def test_every_step_is_the_best_one(folders: dict[str, Path], books: Path, tmp_path: Path) -> None:
    """Each of the path's points against all others that were possible, each by a whole pass."""
    own = measured(folders["selective"], books, tmp_path / "searched", 3)
    other = measured(folders["selective"], books, tmp_path / "whole", 3)

    def loss(budgets: Budgets) -> float:
        return float(np.mean(other.losses("selective", budgets)))

    limit = loss(FULL) + 0.05
    path = list(search(Descent(own), 2, limit))
    for point in path:
        assert point.loss == pytest.approx(loss(point.budgets), rel=1e-6)

    now: Budgets = FULL
    expected = [now]
    for step in (4, 2, 1):
        while True:
            every = [(*now[:i], b - step, *now[i + 1 :]) for i, b in enumerate(now) if b > step + 1]
            best: Budgets = min(every, key=loss, default=now)
            if best == now or loss(best) > (min(limit, loss(now) + FREE) if step == 4 else limit):
                break
            expected.append(best)
            now = best
    assert [point.budgets for point in path] == expected
    freed = {sum(a) - sum(b) for a, b in itertools.pairwise(expected)}
    assert freed >= {4, 2}


def command(folders: dict[str, Path], books: Path, out: Path, *more: str) -> list[str]:
    """Return the arguments of a search that takes seconds."""
    return [
        str(folders["selective"]),
        *("--reference", str(folders["softmax"]), "--books", str(books)),
        *("--length", str(LENGTH), "--step", "2", "--uniform", "4", "12"),
        *("--sequences", "3", "--judge", "6", "--test-sequences", "4"),
        *("--runs", str(out / "runs"), "--out", str(out), *more),
    ]


def lines_of(runs: Path) -> dict[str, list[str]]:
    """Return the evaluations' files."""
    files = (runs / "budgets").iterdir()
    return {file.name: file.read_text().splitlines(keepends=True) for file in files}


def test_result_and_checkpoint(
    folders: dict[str, Path], books: Path, tmp_path: Path, commands: Commands
) -> None:
    """Up to a loss that pruning reaches and one that it does not."""
    own = measured(folders["selective"], books, tmp_path, 6)
    unpruned = float(np.mean(own.losses("none", FULL)))
    allowed = str(unpruned + 0.03)
    out = tmp_path / "pruned"
    targets = ("--max-loss", allowed, "--rise", "1", "2")
    files = ("--write", str(out), "--plot", str(tmp_path / "plot.png"))
    argv = command(folders, books, tmp_path, *targets, *files)
    printed = json.loads(commands.run(budgets, *argv, "--json"))
    found = Found.read(tmp_path / "selective.json")
    assert printed["out"] == str(tmp_path / "selective.json")
    assert list(printed["targets"]) == ["max-loss", "+1 %", "+2 %"]
    assert [target.name for target in found.targets] == ["max-loss", "+1 %", "+2 %"]
    for target in found.targets:
        assert target.reached
        losses = own.losses("selective", tuple(target.budgets))
        assert target.loss == pytest.approx(float(np.mean(losses)), rel=1e-6)
        assert target.loss <= target.max_loss
    assert found.targets[2].max_loss == pytest.approx(unpruned + np.log(1.02))
    assert found.unpruned.value == pytest.approx(unpruned, rel=1e-6)
    assert found.factor([12, 6, 6]) == 3
    best = min(found.path, key=lambda point: (point[1] > 0.03, sum(point[0])))
    assert found.factor_within(0.03) == found.factor(best[0])
    assert found.factor_within(-1.0) == 1

    kinds = {(row.model, row.rule, row.choice) for row in found.rows}
    assert {rule for _, rule, choice in kinds if choice == "uniform"} == {
        *("selective", "recent", "random", "streaming", "heavy hitters")
    }
    assert ("softmax", "none", "unpruned") in kinds
    choices = {tuple(row.budgets): row.choice for row in found.rows if row.rule == "selective"}
    for target in found.targets:
        assert target.name in choices[tuple(target.budgets)].split(", ")
    held_out = of_file(own.checkpoint, books / "great_expectations.txt", 4)
    test = Measured(own.forward, held_out, tmp_path)
    for row in found.rows:
        assert row.factor == pytest.approx(3 * LENGTH / sum(row.budgets), abs=1e-3)
        size = 2 * 2 * 32 * 2 + {"selective": 8}.get(row.model, 8 * (row.rule == "heavy hitters"))
        assert row.bytes == sum(row.budgets) * size
        if row.model == "selective":
            losses = test.losses(row.rule, tuple(row.budgets))
            assert row.loss.value == pytest.approx(float(np.mean(losses)), rel=1e-6)
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"

    config = json.loads((out / "config.json").read_text())
    kept = found.targets[0].budgets
    assert config["attention_variant"] == {"name": "selective", "kv_budgets": kept}
    losses = own.losses("selective", tuple(kept))
    assert of_transformers(out, own) == pytest.approx(losses, abs=1e-4)
    names = {file.name for file in folders["selective"].iterdir()}
    assert {file.name for file in out.iterdir()} == names

    too_low = ("--max-loss", "0.1", "--write", str(tmp_path / "no"))
    shown = commands.run(budgets, *command(folders, books, tmp_path, *too_low), code=2)
    assert "is not written: name a higher --max-loss" in commands.printed.err
    assert "not reached: the unpruned model is above it" in shown
    assert not (tmp_path / "no").exists()
    target = Found.read(tmp_path / "selective.json").targets[0]
    assert (target.reached, target.budgets) == (False, list(FULL))


@pytest.mark.parametrize("bundled", [BUNDLED, Path("nowhere")], ids=["another", "none"])
def test_no_reference(
    bundled: Path,
    folders: dict[str, Path],
    books: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    commands: Commands,
) -> None:
    """Where none is named and the bundled one has another tokenizer or, outside of a checkout, is
    not there: what is left is as it is beside a reference."""
    monkeypatch.setattr(run_module, "BUNDLED", bundled)
    commands.run(budgets, *command(folders, books, tmp_path / "with"))
    assert "Reference: none" not in commands.printed.err
    argv = command(folders, books, tmp_path)
    del argv[1:3]
    files = ("--plot", tmp_path / "plot.png", "--write", tmp_path / "pruned")
    printed = commands.run(budgets, *argv, *files)
    assert commands.printed.err.count("Reference: none") == 1
    for word in ("softmax", "over the reference", "above it"):
        assert word not in printed
    found = Found.read(tmp_path / "selective.json")
    beside = Found.read(tmp_path / "with" / "selective.json")
    assert (found.about["reference"], found.allowance) == (None, None)
    assert list(found.about["digests"]) == ["selective"]
    assert found.unpruned == beside.unpruned
    assert [target.name for target in beside.targets] == ["softmax", "+1 %"]
    assert found.targets == beside.targets[1:]
    assert {(row.model, row.over_reference) for row in found.rows} == {("selective", None)}
    assert {row.rule for row in found.rows} == {"none", "selective", "recent", "random"}
    fixed = [
        [row for row in rows if row.model == "selective" and row.choice in ("unpruned", "uniform")]
        for rows in (found.rows, beside.rows)
    ]
    assert fixed[0] == [dataclasses.replace(row, over_reference=None) for row in fixed[1]]
    assert (tmp_path / "plot.png").exists()
    config = json.loads((tmp_path / "pruned" / "config.json").read_text())
    assert config["attention_variant"]["kv_budgets"] == found.targets[0].budgets

    refusal = commands.refused(budgets, *argv, "--no-rise")
    assert "there is no target: give --rise or --max-loss" in refusal


def test_equal_budgets_beside_a_plain_llama(
    folders: dict[str, Path], books: Path, tmp_path: Path, commands: Commands
) -> None:
    """Without a search each target has the smallest of the uniform budgets within it; a reference
    of transformers' own class gives what the same weights give as a `variant_llama`."""
    trained = AutoModelForCausalLM.from_pretrained(folders["softmax"], dtype=torch.float32)
    values = trained.config.to_dict()
    for name in ("model_type", "architectures", "attention_variant", "sliding_window", "auto_map"):
        values.pop(name, None)
    plain = LlamaForCausalLM(LlamaConfig(**values))
    plain.load_state_dict(trained.state_dict())
    plain.save_pretrained(tmp_path / "softmax")
    for file in folders["softmax"].glob("tokenizer*"):
        shutil.copy(file, tmp_path / "softmax")

    found = []
    for reference in (folders["softmax"], tmp_path / "softmax"):
        argv = command(folders, books, tmp_path / reference.parent.name, "--search=none")
        argv[2] = str(reference)
        commands.run(budgets, *argv)
        found.append(Found.read(tmp_path / reference.parent.name / "selective.json"))
    for own, other in zip(found[0].rows, found[1].rows, strict=True):
        assert own.loss == pytest.approx(other.loss, abs=1e-5)
    equal, path = found[0], dict(found[0].path)
    assert equal.about["search"] == "none" and {len(set(each)) for each in path} == {1}
    for target in equal.targets:
        rise = target.max_loss - equal.unpruned.value
        within = [each for each, own in path.items() if own <= rise]
        assert target.budgets == list(min(within, key=sum)) and target.reached
    assert {row.choice for row in equal.rows} == {"unpruned", "uniform"}


def test_budgets_by_thresholds(
    folders: dict[str, Path], books: Path, tmp_path: Path, commands: Commands
) -> None:
    """A layer needs as many tokens as are ever masked by less than the threshold at once. Each
    target has the lowest threshold within it."""
    own = measured(folders["selective"], books, tmp_path, 3)
    penalties: list[Tensor] = []
    with torch.no_grad():
        own.forward.model.model(own.text.rows[:, :-1], use_cache=False, penalties=penalties)
    thresholds = (0.1, 2.0, 16.0, 100.0)
    needed = own.forward.needed(own.text, thresholds)
    for threshold, found in zip(thresholds, needed, strict=True):
        kept = [(each < threshold).tril().sum(-1).max().item() for each in penalties]
        assert list(found) == [max(LEAST_BUDGET, most) for most in kept]
    assert sum(needed[0]) < sum(needed[2]) < sum(needed[3])

    commands.run(budgets, *command(folders, books, tmp_path, "--search=threshold", "--rise=3"))
    result = Found.read(tmp_path / "selective.json")
    assert result.about["search"] == "threshold" and len(result.path) > 3
    own = measured(folders["selective"], books, tmp_path, 6)
    tried = {
        *own.forward.needed(measured(folders["selective"], books, tmp_path, 3).text, THRESHOLDS)
    }
    for target in result.targets:
        fewer = [each for each in tried if sum(each) < sum(target.budgets)]
        assert target.reached and (tuple(target.budgets) in tried or target.budgets == list(FULL))
        assert target.loss == pytest.approx(np.mean(own.losses("selective", tuple(target.budgets))))
        assert target.loss <= target.max_loss
        assert not fewer or target.max_loss < np.mean(own.losses("selective", max(fewer, key=sum)))
    assert any(target.budgets != list(FULL) for target in result.targets)


def test_bundled_reference(
    folders: dict[str, Path],
    books: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    commands: Commands,
) -> None:
    """It is the reference of a checkpoint of its tokenizer."""
    monkeypatch.setattr(run_module, "BUNDLED", folders["softmax"])
    argv = command(folders, books, tmp_path)
    commands.run(budgets, *argv)
    named = (tmp_path / "selective.json").read_text()
    del argv[1:3]
    commands.run(budgets, *argv)
    assert (tmp_path / "selective.json").read_text() == named


def test_committed_results_are_read_as_they_were_written(tmp_path: Path) -> None:
    files = sorted(FOLDER.glob("*.json"))
    assert files
    for file in files:
        assert Found.read(file).write(tmp_path).read_text() == file.read_text()


def test_goes_on_after_a_kill(
    folders: dict[str, Path],
    books: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    commands: Commands,
) -> None:
    """In the middle of writing a line; the result is that of a run that was never interrupted."""
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    commands.run(budgets, *command(folders, books, whole))
    everything = lines_of(whole / "runs")
    assert sum(map(len, everything.values())) > 40
    (killed / "runs" / "budgets").mkdir(parents=True)
    for name, lines in everything.items():
        text = "".join(lines)
        (killed / "runs" / "budgets" / name).write_text(text[: len(text) // 2])
    commands.run(budgets, *command(folders, books, killed))
    assert lines_of(killed / "runs") == everything
    results = [(folder / "selective.json").read_text() for folder in (whole, killed)]
    assert results[0] == results[1]

    monkeypatch.setattr(Forward, "layer", None)  # nothing is left to measure
    commands.run(budgets, *command(folders, books, killed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({0: "softpick"}, "has softpick attention, which cannot be pruned"),
        ({0: "nothing"}, "nothing has no config.json"),
        ({2: "selective"}, "has selective attention, not softmax"),
        ({2: "nothing"}, "nothing has no config.json"),
        ({2: str(BUNDLED)}, "selective and " + str(BUNDLED) + " differ in their tokenizers"),
        ({4: "."}, "emma.txt is not there"),
        ({6: "4000"}, "fewer than two sequences of 4000"),
        ({10: "1"}, "a layer must keep 2 tokens at least, not 1"),
    ],
)
def test_refusals(
    changes: dict[int, str],
    message: str,
    folders: dict[str, Path],
    books: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    commands: Commands,
) -> None:
    monkeypatch.chdir(folders["selective"].parent)
    argv = command(folders, books, tmp_path)
    for place, value in changes.items():
        argv[place] = value
    assert message in commands.refused(budgets, *argv)


def test_an_existing_folder_is_not_overwritten(
    folders: dict[str, Path], books: Path, tmp_path: Path, commands: Commands
) -> None:
    argv = command(folders, books, tmp_path, "--write", str(folders["softmax"]))
    assert "exists: name another folder or delete it" in commands.refused(budgets, *argv)


def test_no_text_at_hand(
    folders: dict[str, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    commands: Commands,
) -> None:
    """What the checkpoint writes itself, other tokens for each use; both models read them, and the
    writer's own loss is the target's base."""
    monkeypatch.setenv("ATTNSERVE_CACHE", str(tmp_path / "cache"))
    argv = command(folders, tmp_path, tmp_path)
    del argv[3:5]
    runs = tmp_path / "runs"
    del argv[argv.index("--out") : argv.index("--out") + 2]
    commands.run(budgets, *argv)
    assert "Text: what selective writes itself" in commands.printed.err.splitlines()
    found = Found.read(runs / "budgets" / "selective.json")
    assert f"Written to {runs / 'budgets' / 'selective.json'}" in commands.printed.out
    assert found.about["text_from"] == "own"
    assert len(set(found.about["texts"].values())) == 3
    assert [target.name for target in found.targets] == ["+1 %"]

    parts = parts_of(Checkpoint(folders["selective"]), (3, 6, 4), LENGTH)
    assert (len(parts.search), len(parts.judge), len(parts.test)) == (3, 6, 4)
    assert parts.judge.rows.shape == (6, 1 + LENGTH) and (parts.judge.rows[:, 0] == 0).all()
    for name, losses in (("selective", found.unpruned), ("softmax", None)):
        forward = Forward(Checkpoint(folders[name]))
        mean = float(np.mean(forward(parts.judge, FULL, "none")))
        assert found.allowance is not None
        expected = losses or found.unpruned
        change = 0.0 if losses else found.allowance.value
        assert mean == pytest.approx(expected.value + change, rel=1e-5)


def test_users_text(
    folders: dict[str, Path], tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One file of any name: the halves are for search and test, the reference's loss a target."""
    argv = command(folders, tmp_path, tmp_path)
    argv[3:5] = ["--text", str(LICENSE)]
    commands.run(budgets, *argv)
    assert f"Text: {LICENSE.name}" in commands.printed.err.splitlines()
    found = Found.read(tmp_path / "selective.json")
    assert [target.name for target in found.targets] == ["softmax", "+1 %"]
    own = Checkpoint(folders["selective"])
    tokens = own.encode(LICENSE.read_text())
    parts = parts_of(own, (3, 6, 4), LENGTH, [LICENSE])
    assert parts.judge.sequences[0] == tokens[:LENGTH]
    middle = len(tokens) // 2
    assert parts.test.sequences[0] == tokens[middle : middle + LENGTH]
    (tmp_path / "short.txt").write_text("too short")
    argv[4] = str(tmp_path / "short.txt")
    assert "fewer than two sequences of 24" in commands.refused(budgets, *argv)
    argv[4] = "nowhere.txt"
    assert "nowhere.txt is not there" in commands.refused(budgets, *argv)


def test_not_a_result(tmp_path: Path) -> None:
    (tmp_path / "selective.json").write_text("{}")
    with pytest.raises(ValueError, match=r"selective.json is not a result of attnserve budgets"):
        Found.read(tmp_path / "selective.json")
