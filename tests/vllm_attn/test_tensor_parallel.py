"""Tensor parallelism: each rank takes its own heads of a per-head tensor, and their gates."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.reference_model import reference_greedy
from tests.servers import vllm_server
from tests.tiny import tiny_checkpoint
from tests.vllm_attn.client import Client


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ssmax", "forgetting"])
def test_two_ranks(name: str, tmp_path: Path) -> None:
    """Two worker processes, two cores' worth of start-up: behind `-m slow`."""
    ckpt = tiny_checkpoint(tmp_path, name)
    prompt = list(range(40, 120))
    expected = reference_greedy(ckpt, prompt, 24)
    assert min(expected.margins) > 1e-3
    with vllm_server(ckpt, "--dtype=float32", "--tensor-parallel-size=2") as server:
        assert Client(server).greedy(prompt, 24) == expected.tokens
