"""What tests of whole-server benchmarks share."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from tests.quantized import quantize
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of three layers with two KV heads of 32: `softmax`, `selective`, and `w4`, the
    first packed to four bits (its embeddings to eight)."""
    folder = tmp_path_factory.mktemp("checkpoints")
    source = tiny_checkpoint(folder / "softmax", "softmax", tie_word_embeddings=True)
    tiny_checkpoint(folder / "selective", "selective")
    quantize([str(source), str(folder / "w4"), "--bits=4", "--scheme=rtn", "--embeddings=8"])
    return folder


def ours() -> list[psutil.Process]:
    """Return processes of vLLM below this one or left behind by it; dead ones do not count."""
    alive = [p for p in psutil.process_iter(["name"]) if p.status() != psutil.STATUS_ZOMBIE]
    mine = {p.pid for p in psutil.Process().children(recursive=True)}
    return [p for p in alive if p.pid in mine and "vllm" in p.info["name"].lower()]
