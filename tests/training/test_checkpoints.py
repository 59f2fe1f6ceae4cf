"""A checkpoint from books to model card, with a recipe of seconds."""

import csv
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from attn_kernels import variant_names
from attnserve.evaluation.books import split
from attnserve.evaluation.perplexity import Score
from tests.conftest import Commands
from tests.training.conftest import TINY
from training import checkpoints
from training.run import Run


@pytest.fixture(scope="module")
def built(books: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[Score]]:
    """Return a softpick checkpoint trained for a few steps, and its scores."""
    folder = tmp_path_factory.mktemp("built")
    recipe = dataclasses.replace(TINY, steps=40)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "VOCAB_SIZE", 299)
        patch.setattr(checkpoints, "COMPILED", False)
        scores = checkpoints.build(
            "softpick", split(books), folder / "runs", folder / "checkpoints", recipe
        )
    return folder / "checkpoints" / "softpick", scores


def test_folder_is_a_normal_checkpoint(built: tuple[Path, list[Score]]) -> None:
    folder, _ = built
    assert sorted(file.name for file in folder.iterdir()) == [
        "README.md",
        "attnserve_auto.py",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "loss.csv",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    config = json.loads((folder / "config.json").read_text())
    assert config["architectures"] == ["VariantLlamaForCausalLM"]
    assert config["model_type"] == "variant_llama"
    assert config["attention_variant"] == {"name": "softpick"}
    assert config["dtype"] == "bfloat16"
    assert len(list(csv.reader((folder / "loss.csv").open()))) == 41


def test_scores_are_those_of_the_stored_model(built: tuple[Path, list[Score]], books: Path) -> None:
    """The test book's log likelihood, summed token by token from whole windows."""
    folder, scores = built
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    text = (books / "great_expectations.txt").read_text()
    ids = tokenizer.encode(text, add_special_tokens=False)
    total = 0.0
    for start in range(0, len(ids), 16):
        window = [0, *ids[start : start + 16]]
        logits = model(torch.tensor([window])).logits[0].detach().log_softmax(-1)
        total += sum(float(logits[i, token]) for i, token in enumerate(window[1:]))
    (score,) = (s for s in scores if (s.model, s.text) == ("model", "test"))
    assert score.log_likelihood == pytest.approx(total, rel=1e-4)
    assert (score.tokens, score.words, score.bytes) == (len(ids), 600, len(text))
    assert score.per_token == pytest.approx(math.exp(-total / len(ids)), rel=1e-3)
    assert score.per_word == pytest.approx(math.exp(-total / 600), rel=1e-3)
    assert score.per_byte == pytest.approx(math.exp(-total / len(text)), rel=1e-3)


def test_trigram_beats_unigram(built: tuple[Path, list[Score]]) -> None:
    per_token = {(s.model, s.text): s.per_token for s in built[1]}
    assert len(per_token) == 6
    for text in ("validation", "test"):
        assert per_token["trigram", text] < per_token["unigram", text]


def test_card_states_the_scores_and_the_recipe(built: tuple[Path, list[Score]]) -> None:
    folder, scores = built
    card = (folder / "README.md").read_text()
    for score in scores:
        row = f"| {score.text} | {score.model} | {score.per_token:.2f} | {score.per_word:.1f} |"
        assert row in card
    assert "| learning rate | 0.01 |" in card
    assert "40 steps of 2 x 16 tokens" in card
    assert "`first.txt`, `second.txt`" in card
    assert "vllm serve checkpoints/softpick --attention-backend softpick" in card


def test_building_again_trains_no_further(
    built: tuple[Path, list[Score]], books: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, scores = built
    weights = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(Run, "_take_step", None)  # a step would fail
    recipe = dataclasses.replace(TINY, steps=40)
    runs = folder.parents[1] / "runs"
    assert checkpoints.build("softpick", split(books), runs, folder.parent, recipe) == scores
    assert (folder / "model.safetensors").read_bytes() == weights


def test_a_checkpoint_beside_its_variants(
    books: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has a folder of its own name, its variant's name in config.json, and says why it is."""
    monkeypatch.setattr(checkpoints, "VOCAB_SIZE", 299)
    monkeypatch.setattr(checkpoints, "COMPILED", False)
    variant, recipe = checkpoints.EXTRA["selective_prunable"]
    assert recipe == dataclasses.replace(checkpoints.RECIPE, memory_loss=0.1)
    recipe = dataclasses.replace(TINY, memory_loss=recipe.memory_loss)
    out = tmp_path / "checkpoints"
    checkpoints.build("selective_prunable", split(books), tmp_path / "runs", out, recipe)
    folder = out / "selective_prunable"
    config = json.loads((folder / "config.json").read_text())
    assert config["attention_variant"] == {"name": variant} == {"name": "selective"}
    card = (folder / "README.md").read_text()
    assert "# selective_prunable, " in card
    assert "vllm serve checkpoints/selective_prunable --attention-backend selective\n" in card
    assert "plus 0.1 times the share of the tokens that the layers must keep" in card
    assert "| memory loss | 0.1 |" in card
    assert "Made by `python -m training.checkpoints selective_prunable`, " in card
    rows = list(csv.DictReader((folder / "loss.csv").open()))
    assert len(rows) == TINY.steps and "memory" in rows[0]


@pytest.mark.parametrize(
    ("argv", "names"),
    [
        ([], variant_names()),
        (["lssar"], ["lssar"]),
        (["selective_prunable"], ["selective_prunable"]),
    ],
)
def test_command_line_builds_each_variant(
    argv: list[str],
    names: list[str],
    books: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    commands: Commands,
) -> None:
    score = Score("model", "test", -100.0, 50, 20, 80)
    monkeypatch.setattr(checkpoints, "build", lambda *_: [score])
    options = ("--books", books, "--runs", tmp_path, "--json")
    printed = json.loads(commands.run(checkpoints.checkpoints, *argv, *options))
    assert printed == {name: [score.json()] for name in names}


def test_command_line_refuses_an_unknown_variant(commands: Commands) -> None:
    assert "did you mean 'softpick'" in commands.refused(checkpoints.checkpoints, "softpik")


def test_missing_books_are_one_line(tmp_path: Path, commands: Commands) -> None:
    line = commands.refused(checkpoints.checkpoints, "softmax", "--books", tmp_path)
    assert "emma.txt is not there: fetch the thirteen novels" in line
