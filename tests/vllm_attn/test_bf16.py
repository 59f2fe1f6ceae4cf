"""bf16 weights and KV cache: log-probabilities stay near the reference's with the same weights."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.reference_model import ReferenceModel
from tests.servers import vllm_server
from tests.tiny import tiny_checkpoint
from tests.vllm_attn.client import Client


@pytest.mark.parametrize("name", [pytest.param("softpick", marks=pytest.mark.slow), "selective"])
def test_prompt_logprobs(name: str, tmp_path: Path) -> None:
    """Selective's cache page mixes bf16 with float32 accumulators; softpick is a plain one."""
    # Smaller weights than the other tests': this network does not amplify bf16's rounding.
    ckpt = tiny_checkpoint(tmp_path, name, initializer_range=0.08, dtype="bfloat16")
    prompt = torch.randint(2, 256, (150,), generator=torch.Generator().manual_seed(0)).tolist()
    reference_model = ReferenceModel(ckpt)
    expected = torch.stack([reference_model.read(token).log_softmax(-1) for token in prompt[:-1]])
    expected = expected[range(len(expected)), prompt[1:]]
    args = ("--dtype=bfloat16", "--max-num-batched-tokens=64", "--max-model-len=256")
    with vllm_server(ckpt, *args) as server:
        info = Client(server).server_info()
        assert (info.weight_bits, info.kv_cache_dtype) == ("16", "bfloat16")
        served = torch.tensor(Client(server).prompt_logprobs(prompt), dtype=torch.float64)
    error = (served - expected).abs()
    assert expected.std() > 0.1, (
        "the reference's log-probabilities hardly vary: the comparison means nothing"
    )
    assert error.mean() < 0.02 * expected.std()
    assert error.max() < 0.1 * expected.std()
