"""Small texts, and a small random checkpoint."""

from __future__ import annotations

from pathlib import Path

import pytest

from attnserve.evaluation.measures import Data
from tests.tiny import tiny_checkpoint
from tests.training.texts import write_texts

SAMPLES = {"sequences": 2, "length": 48, "pairs": 2, "passages": 2, "calibration": 2, "jobs": 1}
SMALL = [f"--{name}={value}" for name, value in SAMPLES.items()]


@pytest.fixture(scope="session")
def sampled_texts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a cache for the text that checkpoints write, which all tests share."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(autouse=True)
def cache(sampled_texts: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let nothing go into the user's cache."""
    monkeypatch.setenv("ATTNSERVE_CACHE", str(sampled_texts))


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Data:
    """Books and evaluation sets of a few hundred words."""
    return Data(*write_texts(tmp_path_factory.mktemp("texts")))


@pytest.fixture(scope="session")
def texts(data: Data) -> list[str]:
    """Return the options that name small texts and samples."""
    return [*SMALL, f"--books={data.books}", f"--eval={data.evaluation}"]


@pytest.fixture(scope="session")
def softpick(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a random softpick model."""
    folder = tmp_path_factory.mktemp("checkpoints") / "softpick"
    return tiny_checkpoint(folder, "softpick", max_position_embeddings=64, num_hidden_layers=2)
