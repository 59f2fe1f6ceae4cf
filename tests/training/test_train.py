"""The training loop: it learns, resumes to the same bits, and refuses to mix two runs."""

import csv
import dataclasses
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from attn_kernels import variant_names
from attnserve.evaluation.texts import Tokens, read_tokens
from tests.conftest import Commands
from tests.tiny import LICENSE
from tests.training.conftest import TINY
from training.arguments import variant_entry
from training.recipe import TrainingRecipe
from training.run import Run
from training.train import train


@pytest.fixture(scope="module")
def tokens(books: Path, tokenizer: PreTrainedTokenizerFast) -> Tokens:
    return read_tokens([books / "first.txt", books / "second.txt"], tokenizer)


def options(books: Path, tokenizer: Path, out: Path) -> list[str]:
    """Command-line options of a run of 60 steps that saves its state after every one."""
    recipe = dataclasses.asdict(dataclasses.replace(TINY, steps=60))
    settings = [(f"--{name.replace('_', '-')}", str(value)) for name, value in recipe.items()]
    data = [str(books / name) for name in ("first.txt", "second.txt")]
    return [
        *("--variant", "ssmax", "--data", *data, "--tokenizer", str(tokenizer)),
        *("--out", str(out), "--save-every", "1"),
        *(text for setting in settings for text in setting),
    ]


@pytest.mark.integration
def test_killed_and_resumed_equals_uninterrupted(
    books: Path,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
    commands: Commands,
) -> None:
    """kill -9 at two unforeseen moments: the same weights and losses, bit for bit."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    out, whole = tmp_path / "killed", tmp_path / "whole"
    killed = options(books, tmp_path / "tokenizer", out)
    for first_steps in (3, 20):
        process = subprocess.Popen(
            [sys.executable, "-m", "training.train", *killed],
            env=os.environ | {"OMP_NUM_THREADS": "1"},  # as many as this process uses
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while process.poll() is None and steps_of(out) < first_steps:
            time.sleep(0.001)
        process.kill()
        assert process.wait() == -signal.SIGKILL, "it ended before it was killed"
    saved = steps_of(out)
    assert 20 <= saved < 60
    commands.run(train, *killed)
    assert f" {saved}/60 " in commands.printed.err, "it did not go on from its state"

    commands.run(train, *options(books, tmp_path / "tokenizer", whole))
    for file in ("loss.csv", "model/model.safetensors", "model/config.json"):
        assert (out / file).read_bytes() == (whole / file).read_bytes(), file


def steps_of(out: Path) -> int:
    """Return how many steps are in the loss file, which is written after the state."""
    path = out / "loss.csv"
    return len(path.read_text().splitlines()) - 1 if path.exists() else 0


@pytest.mark.parametrize("variant", variant_names())
def test_every_variant_learns(
    variant: str, tokens: Tokens, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    recipe = dataclasses.replace(TINY, steps=60)
    run = Run(tmp_path, recipe, {"name": variant}, tokenizer, tokens)
    initial = {name: p.detach().clone() for name, p in run.model.named_parameters()}
    run.train(save_every=60, quiet=True)
    assert sum(run.losses[-5:]) / 5 < 0.75 * run.losses[0]
    for name, parameter in run.model.named_parameters():
        assert not torch.equal(parameter, initial[name]), f"{name} was never updated"

    run.export(tmp_path / "model", torch.float32)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    assert model.config.variant.name == variant
    assert (model.config.bos_token_id, model.config.eos_token_id) == (0, 1)
    ids = AutoTokenizer.from_pretrained(tmp_path / "model")("the cat", return_tensors="pt")
    torch.testing.assert_close(model(**ids).logits, run.model(**ids).logits)


def test_loss_file_and_schedule(
    tokens: Tokens, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    run = Run(tmp_path, TINY, {"name": "softmax"}, tokenizer, tokens)
    run.train(save_every=5, quiet=True)
    rows = list(csv.DictReader((tmp_path / "loss.csv").open()))
    assert [int(row["step"]) for row in rows] == list(range(12))
    rates = [float(row["learning_rate"]) for row in rows]
    assert rates[:3] == pytest.approx([1e-2 / 3, 2e-2 / 3, 1e-2], rel=1e-5)
    assert rates[3] == pytest.approx(1e-2)
    assert rates[3:] == sorted(rates[3:], reverse=True)
    assert rates[-1] == pytest.approx(1e-3)
    assert [float(row["loss"]) for row in rows] == pytest.approx(run.losses, abs=1e-5)


def test_same_start_and_same_data_for_every_variant(
    tokens: Tokens, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    runs = [
        Run(tmp_path / name, TINY, {"name": name}, tokenizer, tokens)
        for name in ("softmax", "softpick", "ssmax")
    ]
    for step in (0, 7):
        inputs = [run.batches(step)[0] for run in runs]
        assert all(torch.equal(inputs[0], other) for other in inputs[1:])
    weights = [run.model.state_dict() for run in runs]
    for name, tensor in weights[0].items():
        assert all(torch.equal(tensor, other[name]) for other in weights[1:]), name


def test_a_half_written_state_is_not_read(
    tokens: Tokens, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    run = Run(tmp_path, TINY, {"name": "softmax"}, tokenizer, tokens)
    run.train(save_every=6, quiet=True)
    whole = (tmp_path / "state.pt").read_bytes()
    (tmp_path / ".state.pt.1.part").write_bytes(whole[: len(whole) // 2])
    again = Run(tmp_path, TINY, {"name": "softmax"}, tokenizer, tokens)
    assert (again.step, again.losses) == (12, run.losses)


@pytest.mark.parametrize(
    ("recipe", "variant", "text", "message"),
    [
        (dataclasses.replace(TINY, seed=1), "softmax", slice(None), "seed = 0, not 1"),
        (TINY, "softpick", slice(None), "variant = {'name': 'softmax'}"),
        (TINY, "softmax", slice(1, None), "text = "),
    ],
)
def test_another_run_in_the_folder_is_refused(
    recipe: TrainingRecipe,
    variant: str,
    text: slice,
    message: str,
    tokens: Tokens,
    tokenizer: PreTrainedTokenizerFast,
    tmp_path: Path,
) -> None:
    Run(tmp_path, TINY, {"name": "softmax"}, tokenizer, tokens).save()
    with pytest.raises(ValueError, match=message):
        Run(tmp_path, recipe, {"name": variant}, tokenizer, tokens[text])


def test_exported_weights_have_the_stored_precision(
    tokens: Tokens, tokenizer: PreTrainedTokenizerFast, tmp_path: Path
) -> None:
    run = Run(tmp_path, TINY, {"name": "softmax"}, tokenizer, tokens)
    run.export(tmp_path / "model")
    stored = load_file(tmp_path / "model" / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    name = "model.layers.1.mlp.up_proj.weight"
    assert torch.equal(stored[name], run.model.state_dict()[name].bfloat16())
    assert {p.dtype for p in run.model.parameters()} == {torch.float32}


def test_variant_option() -> None:
    assert variant_entry("softpick") == {"name": "softpick"}
    assert variant_entry('{"name": "lssar", "power": 3}') == {"name": "lssar", "power": 3}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("softpik", "did you mean 'softpick'"),
        ('{"name": "softpick", "power": 3}', "no parameter 'power'"),
        ("{name}", "Expecting property name"),
        ('{"powr": 3}', 'names no variant: write it as {"name": "lssar", "power": 3}'),
    ],
)
def test_wrong_variant_is_one_line(
    text: str, message: str, tmp_path: Path, commands: Commands
) -> None:
    others = ("--data", LICENSE, "--tokenizer", "x", "--out", tmp_path)
    line = commands.refused(train, "--variant", text, *others)
    assert message in line and "config.json" not in line
