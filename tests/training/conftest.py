"""Small texts and recipes that train in seconds."""

from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

from tests.hf_attn.conftest import one_thread  # noqa: F401  a fixture of this package too
from training.recipe import TrainingRecipe
from training.tokenizer import train_tokenizer

WORDS = "the cat sat on a mat and saw one old dog run to its home by night"

TINY = TrainingRecipe(
    hidden_size=32,
    layers=2,
    heads=2,
    kv_heads=2,
    intermediate_size=48,
    context=16,
    batch=2,
    steps=12,
    warmup=3,
    learning_rate=1e-2,
)


@pytest.fixture(scope="session")
def books(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder of books, named as the real ones, in which two words may follow each word."""
    folder = tmp_path_factory.mktemp("books")
    words = WORDS.split()
    for seed, name in enumerate(("first", "second", "emma", "great_expectations")):
        steps = np.random.default_rng(seed).choice([1, 4], size=600)
        text = " ".join(words[place % len(words)] for place in steps.cumsum())
        (folder / f"{name}.txt").write_text(text + "\n")
    return folder


@pytest.fixture(scope="session")
def tokenizer(books: Path) -> PreTrainedTokenizerFast:
    """Return a tokenizer trained on the two training books."""
    return train_tokenizer([books / "first.txt", books / "second.txt"], 299, TINY.context)
