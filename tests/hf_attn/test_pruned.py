"""Budgets in transformers: the answers of the rule carried out token by token."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_kernels import VariantError, get_variant, variant_names
from hf_attn import VariantLlamaForCausalLM
from tests.reference_model import Greedy, clear_greedy, reference_greedy
from tests.tiny import tiny_checkpoint

NUM_TOKENS = 8
LENGTHS = (9, 30, 41)


@pytest.fixture(
    scope="module", params=[name for name in variant_names() if get_variant(name).prunable]
)
def checkpoint(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Path:
    folder = tmp_path_factory.mktemp("pruned")
    return tiny_checkpoint(folder, {"name": request.param, "kv_budgets": [8, 4, 12]})


@pytest.fixture(scope="module")
def answers(checkpoint: Path) -> list[tuple[list[int], Greedy]]:
    return [clear_greedy(checkpoint, length, NUM_TOKENS) for length in LENGTHS]


def generate(model: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy tokens after prompts that padding on the left makes equally long."""
    longest = max(map(len, prompts))
    ids = torch.tensor([[0] * (longest - len(p)) + p for p in prompts])
    mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in prompts])
    new = {"max_new_tokens": NUM_TOKENS, "min_new_tokens": NUM_TOKENS, "do_sample": False}
    output = model.generate(ids, attention_mask=mask, **new, eos_token_id=None, pad_token_id=0)
    tokens: list[list[int]] = output[:, longest:].tolist()
    return tokens


def test_generate(checkpoint: Path, answers: list[tuple[list[int], Greedy]]) -> None:
    model = VariantLlamaForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    for prompt, expected in answers:
        assert generate(model, [prompt]) == [expected.tokens]
    batch = generate(model, [prompt for prompt, _ in answers])
    assert batch == [expected.tokens for _, expected in answers]


def test_pruning_matters(checkpoint: Path, answers: list[tuple[list[int], Greedy]]) -> None:
    """The comparison above means something."""
    prompt, expected = answers[-1]
    name = json.loads((checkpoint / "config.json").read_text())["attention_variant"]["name"]
    assert (
        reference_greedy(checkpoint, prompt, NUM_TOKENS, {"name": name}).tokens != expected.tokens
    )


def test_a_budget_for_each_layer(tmp_path: Path) -> None:
    with pytest.raises(VariantError, match="2 entries and the model 3 layers"):
        tiny_checkpoint(tmp_path, {"name": "selective", "kv_budgets": [24, 10]})
