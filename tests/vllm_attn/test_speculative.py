"""Speculative decoding without a draft model: rejected tokens leave nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.reference_model import clear_greedy
from tests.servers import vllm_server
from tests.tiny import tiny_checkpoint
from tests.vllm_attn.client import Client

NUM_TOKENS = 48
NGRAM = {
    "method": "ngram",
    "num_speculative_tokens": 4,
    "prompt_lookup_max": 2,
    "prompt_lookup_min": 1,
}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["softpick", "forgetting"])
def test_rejected_tokens(name: str, tmp_path: Path) -> None:
    """Of a random model nearly all drafts are rejected, and their keys, values and gates written
    over."""
    ckpt = tiny_checkpoint(tmp_path, name)
    prompt, expected = clear_greedy(ckpt, 150, NUM_TOKENS)
    args = ("--dtype=float32", "--block-size=16", "--max-model-len=256")
    with vllm_server(ckpt, *args, f"--speculative-config={json.dumps(NGRAM)}") as server:
        client = Client(server)
        assert client.greedy(prompt, NUM_TOKENS) == expected.tokens
        drafted = client.metric("vllm:spec_decode_num_draft_tokens_total")
        accepted = client.metric("vllm:spec_decode_num_accepted_tokens_total")
        assert drafted - accepted > 8
