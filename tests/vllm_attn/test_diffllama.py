"""transformers' `diffllama` from vLLM: the same tokens and log-probabilities, with any backend."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from quant.checkpoint import Recipe, quantize_checkpoint
from tests.servers import vllm_server
from tests.vllm_attn.client import Client
from tests.vllm_attn.loading import load, one_worker
from tests.vllm_attn.test_architectures import NUM_TOKENS, reference, served, write
from vllm_attn.report import StartupError

pytestmark = pytest.mark.integration

PROMPT = torch.randint(2, 256, (100,), generator=torch.Generator().manual_seed(0)).tolist()


def test_same_answers_as_transformers(tmp_path: Path) -> None:
    """With our softmax, vLLM's own, another variant and packed weights, whose rows are pairs of
    heads as well."""
    model = write("diffllama", tmp_path / "softmax")
    for name in ("cpu_attn", "softpick"):
        shutil.copytree(tmp_path / "softmax", tmp_path / name)
    recipe = Recipe(4, "rtn", 32)
    packed, _ = quantize_checkpoint(tmp_path / "softmax", tmp_path / "packed", recipe, None, "test")
    expected = {"softmax": reference(model, PROMPT), "packed": reference(packed, PROMPT)}
    expected["cpu_attn"] = expected["softmax"]
    model.set_attn_implementation("softpick")
    expected["softpick"] = reference(model, PROMPT)
    backends = {"packed": "softmax"}
    found = served({tmp_path / name: backends.get(name, name) for name in expected}, PROMPT)
    for (name, (logprobs, tokens)), answer in zip(expected.items(), found, strict=True):
        assert "refused" not in answer, answer
        error = (torch.tensor(answer["logprobs"]) - logprobs).abs().max()
        assert error < 1e-4 * logprobs.std(), name
        assert answer["tokens"] == tokens, name
    differ = (expected["softpick"][0] - expected["softmax"][0]).abs().max()
    assert differ > 0.1, "the two variants hardly differ: the comparison means nothing"


def test_what_is_refused(tmp_path: Path) -> None:
    """A formula that is not of the scores alone, and adapters."""
    write("diffllama", tmp_path)
    with one_worker(tmp_path):
        with pytest.raises(StartupError, match="lssa attention does not run as a difference of tw"):
            load(tmp_path, attention_backend="LSSA")
        with pytest.raises(StartupError, match="adapters of a diffllama"):
            load(tmp_path, enable_lora=True)


@pytest.mark.slow
@pytest.mark.parametrize("kv_heads", [4, 2])
def test_two_ranks(kv_heads: int, tmp_path: Path) -> None:
    """Each has pairs of its own, or both the one pair of KV heads that there is."""
    model = write("diffllama", tmp_path, num_key_value_heads=kv_heads)
    arguments = ("--dtype=float32", "--max-model-len=256", "--tensor-parallel-size=2")
    with vllm_server(tmp_path, *arguments, "--attention-backend=softmax") as server:
        assert Client(server).greedy(PROMPT, NUM_TOKENS) == reference(model, PROMPT)[1]


@pytest.mark.slow
def test_bfloat16(tmp_path: Path) -> None:
    """With keys and values in 8 bits: log-probabilities are near, as near as rounding lets them."""
    model = write("diffllama", tmp_path, initializer_range=0.04).bfloat16().float()
    expected = reference(model, PROMPT)[0]
    arguments = ("--dtype=bfloat16", "--max-model-len=256", "--max-num-batched-tokens=64")
    for cache in ("auto", "int8_per_token_head"):
        backend = ("--attention-backend=softmax", f"--kv-cache-dtype={cache}")
        with vllm_server(tmp_path, *arguments, *backend) as server:
            served = torch.tensor(Client(server).prompt_logprobs(PROMPT))
        error = (served - expected).abs() / expected.std()
        assert error.mean() < 0.02 and error.max() < 0.1, (cache, error.mean(), error.max())
