"""The checkpoints that the repository carries."""

import csv
import json
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

import hf_attn  # noqa: F401  registers the model class
from attnserve.evaluation.checkpoint import Checkpoint
from tests.reference_model import reference_greedy
from training.checkpoints import EXTRA
from training.tokenizer import PARAGRAPHS

CHECKPOINTS = Path(__file__).resolve().parents[2] / "checkpoints"
SHIPPED = sorted(file.parent for file in CHECKPOINTS.glob("*/config.json"))


def test_softmax_and_softpick_are_there() -> None:
    assert {"softmax", "softpick"} <= {folder.name for folder in SHIPPED}


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_generates_the_references_tokens(folder: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    assert model.config.variant.name == EXTRA.get(folder.name, [folder.name])[0]
    ids = AutoTokenizer.from_pretrained(folder)("The old man looked at", return_tensors="pt")
    expected = reference_greedy(folder, ids.input_ids[0].tolist(), 24)
    assert min(expected.margins) > 1e-3
    output = model.generate(
        **ids, max_new_tokens=24, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    assert output[0, ids.input_ids.shape[1] :].tolist() == expected.tokens


def test_committed_results_are_of_these_checkpoints() -> None:
    results = CHECKPOINTS.parent / "quant" / "results" / "configs"
    files = sorted(results.glob("*/unquantized.json"))
    assert files
    for file in files:
        key = json.loads(file.read_text())["key"]
        assert Checkpoint(CHECKPOINTS / file.parent.name).digest == key["checkpoint"]


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_batch_with_padding(folder: Path) -> None:
    """Each of two prompts goes on as it does alone."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    texts = ["The old man looked at", "It was a dark night, and the rain fell upon the city while"]

    def answers(*texts: str) -> list[list[int]]:
        batch = tokenizer(list(texts), return_tensors="pt", padding=True)
        output = model.generate(**batch, max_new_tokens=12, do_sample=False)
        return [row[batch.input_ids.shape[1] :].tolist() for row in output]

    together = answers(*texts)
    assert together == [*answers(texts[0]), *answers(texts[1])]
    assert together[0] != together[1]


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_chat_template(folder: Path) -> None:
    """Paragraphs, in the file that the recipe would write; the vocabulary is as it was trained."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template == PARAGRAPHS
    assert len(tokenizer) == AutoConfig.from_pretrained(folder).vocab_size
    chat = [
        {"role": "system", "content": " Hush. "},
        {"role": "user", "content": "“Who goes there?”"},
    ]
    text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    assert text == "<s>Hush.\n\n“Who goes there?”\n\n"
    text = tokenizer.apply_chat_template(chat, tokenize=False, continue_final_message=True)
    assert text == "<s>Hush.\n\n“Who goes there?”"
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id and ids.count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_learned_about_what_a_trigram_knows(folder: Path) -> None:
    """By its card, on both held-out books; and its loss fell as its loss file says. lssar, which
    learns slowest, is 4 % behind the trigram on one book."""
    rows = re.findall(
        r"^\| (validation|test) \| (\w+) \| ([\d.]+) \|", (folder / "README.md").read_text(), re.M
    )
    perplexity = {(text, model): float(value) for text, model, value in rows}
    assert len(perplexity) == 6
    for text in ("validation", "test"):
        assert perplexity[text, "model"] < 1.05 * perplexity[text, "trigram"]
        assert perplexity[text, "trigram"] < perplexity[text, "unigram"]
    losses = [float(row["loss"]) for row in csv.DictReader((folder / "loss.csv").open())]
    assert losses[0] > 7
    assert sum(losses[-100:]) / 100 < 4


@pytest.mark.parametrize("folder", SHIPPED, ids=lambda folder: folder.name)
def test_small_enough_for_the_repository(folder: Path) -> None:
    assert all(file.stat().st_size < 16e6 for file in folder.iterdir())
