"""The trained checkpoints in the repository, served: the reference's tokens for real prompts."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.reference_model import reference_greedy
from tests.servers import vllm_server
from tests.vllm_attn.client import Client

CHECKPOINTS = sorted(Path(__file__).parents[2].glob("checkpoints/*/config.json"))
TEXTS = (
    "It was the best of times,",
    "“My dear Mr. Bennet,” said his lady to him one day,",
    "Call me Ishmael.",
    "The old man looked at her",
    "In the morning they went out together, and",
    "He had never in his life",
)
NUM_TOKENS = 24


QUICK = ("softpick",)
"""Of the others `test_serve.py` serves random weights, with the same comparison."""


@pytest.mark.parametrize(
    "config",
    [
        pytest.param(
            config,
            id=config.parent.name,
            marks=[] if config.parent.name in QUICK else pytest.mark.slow,
        )
        for config in CHECKPOINTS
    ],
)
def test_same_tokens_as_the_reference(config: Path) -> None:
    ckpt = config.parent
    tokenizer = AutoTokenizer.from_pretrained(ckpt)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    expected = [reference_greedy(ckpt, prompt, NUM_TOKENS) for prompt in prompts]
    # A served token may differ only where float32 cannot tell the two best apart.
    decided = [
        next((i for i, margin in enumerate(answer.margins) if margin < 1e-3), NUM_TOKENS)
        for answer in expected
    ]
    assert sum(decided) > 0.8 * NUM_TOKENS * len(prompts), "too many near ties to compare"
    backend = json.loads(config.read_text())["attention_variant"]["name"]
    with vllm_server(ckpt, "--dtype=float32", f"--attention-backend={backend}") as server:
        client = Client(server)
        answers = [client.greedy(prompt, NUM_TOKENS) for prompt in prompts]
        together = client.greedy_together(prompts, NUM_TOKENS)
    for served in (answers, together):
        for tokens, answer, n in zip(served, expected, decided, strict=True):
            assert tokens[:n] == answer.tokens[:n]
