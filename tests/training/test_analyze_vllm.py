"""`training.analyze` gives the same figures through vLLM as through transformers."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.servers import COMMON_ENV
from tests.tiny import tiny_checkpoint
from tests.training.texts import write_texts
from training.analyze.store import read

pytestmark = pytest.mark.integration

SETTINGS = ("--limit=3", "--max-length=512", "--measures")
MEASURES = ("length", "passkey", "lambada", "blimp", "perplexity")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softpick", "selective"])
def test_same_figures(name: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / name, name, max_position_embeddings=256)
    books, evaluation = write_texts(tmp_path)
    out = tmp_path / "out"
    for engine in ("vllm", "transformers"):
        argv = [str(folder), f"--books={books}", f"--eval={evaluation}", f"--out={out}"]
        argv += [f"--engine={engine}", *SETTINGS, *MEASURES]
        command = [sys.executable, "-m", "training.analyze", *argv]
        environment = {**os.environ, **COMMON_ENV, "VLLM_LOGGING_LEVEL": "WARNING"}
        done = subprocess.run(
            command, env=environment, capture_output=True, text=True, timeout=600, check=False
        )
        assert done.returncode == 0, done.stderr[-3000:]
    for measure in MEASURES:
        ours = read(out / name / f"{measure}.json")
        theirs = read(out / name / f"{measure}.vllm.json")
        assert ours.key == theirs.key
        assert list(ours.result.summary) == list(theirs.result.summary)
        for figure, estimate in ours.result.summary.items():
            # Log-probabilities of whole keys and words are sums of many tokens'.
            expected = pytest.approx(estimate, rel=1e-3, abs=1e-3, nan_ok=True)
            assert theirs.result.summary[figure] == expected, figure
    assert read(out / name / "length.json").key["settings"]["multiple"] == 2
