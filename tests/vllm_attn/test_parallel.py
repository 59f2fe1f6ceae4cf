"""Tensor and pipeline parallelism, and speculative decoding: tokens and log-probabilities are those
of one process without them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from attn_kernels import get_variant, variant_names
from attnserve.files import CHECKOUT
from tests.tiny import tiny_checkpoint
from tests.vllm_attn.offline import Found, answers

NUM_TOKENS = 24
PROMPT_LENGTHS = (1, 3, 63, 64, 65, 130, 200)
"""Around the chunk (64), and all in one batch."""

BUDGETS = {"name": "selective", "kv_budgets": [8, 4, 12]}
ONE: Mapping[str, Any] = {}
TENSOR = {"tensor_parallel_size": 2}
PIPELINE = {  # which vLLM's CPU worker cannot without a graph: DYNAMO_TRACE_ONCE, no compiler
    "pipeline_parallel_size": 2,
    "enforce_eager": False,
    "compilation_config": {"mode": 2, "backend": "eager"},
}
NGRAM = {
    "speculative_config": {
        "method": "ngram",
        "num_speculative_tokens": 4,
        "prompt_lookup_max": 3,
        "prompt_lookup_min": 1,
    },
    "disable_log_stats": False,
}

ROUNDING = 1e-4
"""Of a log-probability: sums over ranks are float32 in another order (seen: 4e-5)."""


def prompts() -> list[list[int]]:
    g = torch.Generator().manual_seed(0)
    return [torch.randint(2, 256, (n,), generator=g).tolist() for n in PROMPT_LENGTHS]


def check(folder: Path, variants: Sequence[Any], *options: Mapping[str, Any]) -> list[Found]:
    """Check that checkpoints of these variants answer alike with all options; return what was
    found with them."""
    runs = (ONE, *options)
    jobs = []
    for place, variant in enumerate(variants):
        checkpoint = tiny_checkpoint(folder / str(place), variant)
        jobs += [(checkpoint, each) for each in runs]
    found = answers(jobs, prompts(), NUM_TOKENS)
    for start, variant in zip(range(0, len(jobs), len(runs)), variants, strict=True):
        expected, *others = found[start : start + len(runs)]
        assert "refused" not in expected, f"{variant}: {expected}"
        for other, option in zip(others, options, strict=True):
            what = f"{variant} with {option}"
            assert "refused" not in other, f"{what}: {other}"
            for one, right in zip(other["answers"], expected["answers"], strict=True):
                assert one["tokens"] == right["tokens"], what
                difference = torch.tensor(one["logprobs"]) - torch.tensor(right["logprobs"])
                assert difference.abs().max() < ROUNDING, what
    return found


@pytest.mark.slow
@pytest.mark.parametrize("options", [TENSOR, PIPELINE], ids=["tensor", "pipeline"])
def test_two_ranks(tmp_path: Path, options: Mapping[str, Any]) -> None:
    """Each rank takes its own heads of learned per-head tensors, and one head 0 with budgets that
    evict; or two layers, or the third."""
    check(tmp_path, [*variant_names(), BUDGETS], options)


@pytest.mark.slow
def test_selective_with_one_kv_head(tmp_path: Path) -> None:
    """Both ranks have it, and only one of them head 0's query."""
    folder = tiny_checkpoint(tmp_path, BUDGETS, num_key_value_heads=1)
    one, two = answers([(folder, ONE), (folder, TENSOR)], prompts(), NUM_TOKENS)
    for answer, right in zip(two["answers"], one["answers"], strict=True):
        assert answer["tokens"] == right["tokens"]


@pytest.mark.slow
def test_speculative_decoding(tmp_path: Path) -> None:
    """Rejected tokens leave no trace."""
    stateless = [name for name in variant_names() if not get_variant(name).stateful]
    found = check(tmp_path, stateless, NGRAM)
    for each in found[1::2]:
        assert each["accepted"] < each["drafted"]
    # Random weights accept none; what was trained on text goes round in circles.
    trained = CHECKOUT / "checkpoints/softpick"
    one, other = answers([(trained, ONE), (trained, NGRAM)], prompts(), NUM_TOKENS)
    assert other["accepted"] > 0
    for answer, right in zip(other["answers"], one["answers"], strict=True):
        assert answer["tokens"] == right["tokens"]
