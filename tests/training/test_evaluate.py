"""`attnserve evaluate`: which text it reads, and what it says of it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from attn_kernels import variant_names
from attnserve.evaluation import perplexity, texts
from attnserve.evaluation.books import split
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.evaluate import evaluate
from attnserve.sampled_text import sampled_text
from tests.conftest import Commands
from tests.tiny import tiny_checkpoint


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Return an empty cache folder: no novels, no sampled text."""
    monkeypatch.setenv("ATTNSERVE_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture(scope="module", params=variant_names())
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a tiny checkpoint of each variant, in the folder of its name."""
    return tiny_checkpoint(tmp_path_factory.mktemp("tiny") / request.param, request.param)


def scores(commands: Commands, *argv: object) -> list[dict[str, Any]]:
    """Return what the command prints as JSON."""
    rows: list[dict[str, Any]] = json.loads(commands.run(evaluate, *argv, "--json"))["scores"]
    return rows


@pytest.mark.integration
def test_no_text_at_hand(checkpoint: Path, home: Path, commands: Commands) -> None:
    """The mean loss over what the checkpoint wrote, and the words that say what that is."""
    shown = commands.run(evaluate, checkpoint, "--sequences", 2)
    assert "the entropy of its own sampling" in shown and f"| {checkpoint.name} |" in shown
    (row,) = scores(commands, checkpoint, "--sequences", 2)
    text = sampled_text(checkpoint, "evaluation", 2, 513)
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    with torch.no_grad():
        loss = model(input_ids=text, labels=text).loss
    assert row["tokens"] == 1024
    assert row["per_token"] == pytest.approx(math.exp(loss), rel=1e-4)


def test_users_text(tmp_path: Path, home: Path, commands: Commands) -> None:
    """One file of any name is enough; a short one is read whole, a long one's beginning."""
    folder = tiny_checkpoint(tmp_path / "tiny", "softpick")
    file = tmp_path / "notes.md"
    file.write_text("The rain — it fell.\n" * 3, encoding="utf-8")
    shown = commands.run(evaluate, folder, "--text", file)
    assert "| notes.md | tiny |" in shown and "entropy" not in shown
    (row,) = scores(commands, folder, "--text", file)
    assert (row["words"], row["bytes"]) == (15, 66)
    file.write_text("The rain — it fell.\n" * 900, encoding="utf-8")
    (row,) = scores(commands, folder, "--text", file, "--sequences", 1)
    assert row["tokens"] == Checkpoint(folder).context
    assert 0 < row["bytes"] < 66 * 300


def test_novels_and_baselines(books: Path, tmp_path: Path, home: Path, commands: Commands) -> None:
    """Named with --books or fetched; the baselines only where they are asked for."""
    folder = tiny_checkpoint(tmp_path / "tiny", "softmax")
    named = scores(commands, folder, "--books", books, "--whole")
    assert [row["text"] for row in named] == ["validation", "test"]
    home.mkdir()
    (home / "books").symlink_to(books)
    rows = scores(commands, folder, "--whole", "--ngrams")
    assert [row for row in rows if row["model"] == "tiny"] == named
    assert {row["model"] for row in rows} == {"tiny", "trigram", "unigram"}
    own = Checkpoint(folder)
    scored = perplexity.evaluate(own, texts.held_out(own, split()), split().train, quiet=True)
    assert [score.log_likelihood for score in scored] == [row["log_likelihood"] for row in rows]


def test_no_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Commands) -> None:
    """A user without a home folder, as in some containers, has no cache: nothing is kept."""
    for name in ("ATTNSERVE_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(Path, "home", lambda: (_ for _ in ()).throw(RuntimeError()))
    folder = tiny_checkpoint(tmp_path / "tiny", "softmax")
    assert "own sampling" in commands.run(evaluate, folder, "--sequences", 1)


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (["nowhere"], "nowhere has no config.json: name a checkpoint's folder"),
        (["CKPT", "--text", "nowhere.txt"], "nowhere.txt is not there: name a text file"),
        (["CKPT", "--text", "EMPTY"], "has no words"),
        (["CKPT", "--text", "CKPT/model.safetensors"], "is no UTF-8 text"),
        (["CKPT", "--books", "nowhere"], "nowhere/emma.txt is not there: fetch the thirteen"),
        (
            ["CKPT", "--ngrams"],
            "emma.txt is not there: fetch the thirteen novels with `attnserve books",
        ),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_what_is_not_there_is_one_line(
    argv: list[str], line: str, tmp_path: Path, home: Path, commands: Commands
) -> None:
    folder = tiny_checkpoint(tmp_path / "tiny", "softpick")
    (tmp_path / "empty.txt").touch()
    places = {"CKPT": str(folder), "EMPTY": str(tmp_path / "empty.txt")}
    for name, place in places.items():
        argv = [argument.replace(name, place) for argument in argv]
    assert line in commands.refused(evaluate, *argv)
