"""Tensor and pipeline parallelism, and speculative decoding: tokens and log-probabilities are those
of one process without them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_kernels import get_variant, variant_names
from tests.tiny import tiny_checkpoint
from tests.vllm_attn.offline import Found, answers

NUM_TOKENS = 24
PROMPT_LENGTHS = (1, 3, 63, 64, 65, 130, 200)
"""Around the chunk (64), and all in one batch."""

BUDGETS = {"name": "selective", "kv_budgets": [8, 4, 12]}
ONE: Mapping[str, Any] = {}
TENSOR = {"tensor_parallel_size": 2}
PIPELINE = {"pipeline_parallel_size": 2}
NGRAM = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    }
}

ROUNDING = 1e-4
"""Of a log-probability: sums over ranks are float32 in another order (seen: 3e-5)."""


def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(2, 256, (n,), generator=g).tolist() for n in PROMPT_LENGTHS]


def check_same(found: Found, expected: Found) -> None:
    assert not isinstance(found, str), found
    assert not isinstance(expected, str), expected
    for one, other in zip(found, expected, strict=True):
        assert one["tokens"] == other["tokens"]
        difference = torch.tensor(one["logprobs"]) - torch.tensor(other["logprobs"])
        assert difference.abs().max() < ROUNDING


def check(folder: Path, *options: Mapping[str, Any]) -> None:
    """Check that a checkpoint answers alike with all these options."""
    expected, *found = answers([(folder, each) for each in (ONE, *options)], prompts(), NUM_TOKENS)
    for each in found:
        check_same(each, expected)


@pytest.mark.integration
def test_selective_on_two_ranks(tmp_path: Path) -> None:
    """With GQA and budgets that evict; head 0 is on one rank."""
    check(tiny_checkpoint(tmp_path, BUDGETS), TENSOR)


@pytest.mark.slow
def test_selective_with_one_kv_head(tmp_path: Path) -> None:
    """Both ranks have it, and only one of them head 0's query."""
    check(tiny_checkpoint(tmp_path, "selective", num_key_value_heads=1), TENSOR)


@pytest.mark.slow
@pytest.mark.parametrize("variant", [*variant_names(), BUDGETS], ids=str)
def test_two_ranks(tmp_path: Path, variant: str | dict[str, Any]) -> None:
    """Each rank takes its own heads of learned per-head tensors; or two layers, or the third."""
    check(tiny_checkpoint(tmp_path, variant), TENSOR, PIPELINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "variant", [name for name in variant_names() if not get_variant(name).stateful]
)
def test_speculative_decoding(tmp_path: Path, variant: str) -> None:
    """Rejected tokens leave no trace."""
    check(tiny_checkpoint(tmp_path, variant), NGRAM)
