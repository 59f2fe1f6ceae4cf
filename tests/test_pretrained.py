"""The pretrained model that comes with a clone: vLLM serves its packed weights, and it chats."""

from __future__ import annotations

from typing import Any

import pytest
from openai import OpenAI

from attnserve.evaluation.checkpoint import read_config
from attnserve.files import CHECKOUT
from tests.servers import vllm_server

MODEL = CHECKOUT / "models" / "smollm2-softpick"
QUESTIONS = {"What is the capital of France?": "Paris", "What is 2 + 2?": "4"}


def test_it_comes_in_under_90_mb() -> None:
    """As much as a clone may be larger by."""
    assert sum(file.stat().st_size for file in MODEL.iterdir()) < 90e6


@pytest.mark.integration
def test_it_chats() -> None:
    config = read_config(MODEL)
    assert config.attention_variant == {"name": "softpick"}
    assert config.quantization_config["quant_method"]
    with vllm_server(MODEL, "--max-model-len=256") as server:
        client = OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        model = client.models.list().data[0].id
        for question, expected in QUESTIONS.items():
            messages: Any = [{"role": "user", "content": question}]
            answer = client.chat.completions.create(
                model=model, messages=messages, max_tokens=60, temperature=0.0
            ).choices[0]
            assert expected in (answer.message.content or ""), question
            assert answer.finish_reason == "stop", answer
