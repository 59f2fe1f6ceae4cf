"""flash-linear-attention's `forgetting_transformer` checkpoints in vLLM, as they are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.fla_forgetting import EVERYTHING, clear_prompt, fox_checkpoint, fox_logits
from tests.servers import vllm_server
from tests.vllm_attn.client import Client
from tests.vllm_attn.loading import load, one_worker
from tests.vllm_attn.test_refusals import make_config
from vllm_attn import fla_model
from vllm_attn.report import StartupError

NUM_TOKENS = 24
PROMPT_LENGTHS = (3, 16, 65, 150)
SERVE_ARGS = (
    "--dtype=float32",
    "--max-num-batched-tokens=64",  # prefill in chunks, mixed with the decoding of other requests
    "--block-size=16",
    "--max-model-len=256",
)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "args"),
    [
        pytest.param(EVERYTHING, [], id="everything"),
        pytest.param({}, [], id="plain"),
        pytest.param(EVERYTHING, ["--tensor-parallel-size=2"], id="two-ranks"),
        pytest.param(EVERYTHING, ["--no-enforce-eager"], id="compiled"),
    ],
)
def test_same_answers_as_the_reference(
    fields: dict[str, Any], args: list[str], tmp_path: Path
) -> None:
    """Greedy tokens, alone and together, and log-probabilities of a prompt; no flags needed."""
    folder = fox_checkpoint(tmp_path, **fields)
    prompts, expected = zip(
        *(clear_prompt(folder, length, NUM_TOKENS) for length in PROMPT_LENGTHS), strict=True
    )
    assert len({token for tokens in expected for token in tokens}) > 20
    longest = prompts[-1]
    logprobs = fox_logits(folder, longest[:-1]).log_softmax(-1)[range(149), longest[1:]]
    with vllm_server(folder, *SERVE_ARGS, *args) as server:
        client = Client(server)
        assert [client.greedy(prompt, NUM_TOKENS) for prompt in prompts] == list(expected)
        assert client.greedy_together(list(prompts), NUM_TOKENS) == list(expected)
        served = torch.tensor(client.prompt_logprobs(longest), dtype=torch.float64)
        torch.testing.assert_close(served, logprobs, atol=1e-3, rtol=1e-3)
        assert "forgetting attention, as the checkpoint's config.json says" in server.log()


def test_every_tensor_is_loaded(tmp_path: Path) -> None:
    """The gates' and the heads' norms. (vLLM hides a layer's weight in the order of its kernel.)"""
    folder = fox_checkpoint(tmp_path, **EVERYTHING)
    weights, x = load_file(folder / "model.safetensors"), torch.randn(5, 128)
    with one_worker(folder), torch.no_grad():
        for layer, module in enumerate(load(folder).model.layers):
            own, prefix = module.self_attn, f"model.layers.{layer}.attn."
            f, g = (weights[f"{prefix}{part}_proj.weight"] for part in "fg")
            projected = x @ f.T + weights[prefix + "f_proj.bias"]
            torch.testing.assert_close(own.f_proj(x)[0], projected)
            torch.testing.assert_close(own.g_proj(x)[0], x @ g.T)
            for name in ("q_norm.weight", "k_norm.weight"):
                assert torch.equal(own.get_parameter(name), weights[prefix + name]), name


@pytest.mark.parametrize(("kv_heads", "heads_of_rank_3"), [(8, [6, 7]), (2, [1])])
def test_norms_of_a_rank(
    kv_heads: int, heads_of_rank_3: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of four ranks takes its heads; two share one where there are only two."""
    monkeypatch.setattr(fla_model, "get_tensor_model_parallel_rank", lambda: 3)
    monkeypatch.setattr(fla_model, "get_tensor_model_parallel_world_size", lambda: 4)
    norm = fla_model.HeadRMSNorm(len(heads_of_rank_3), 16)
    whole = torch.rand(kv_heads * 16)
    norm.load(norm.weight, whole)
    assert torch.equal(norm.weight.view(-1, 16), whole.view(-1, 16)[heads_of_rank_3])


def test_a_missing_gate_is_one_line(tmp_path: Path) -> None:
    folder = fox_checkpoint(tmp_path)
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.attn.f_proj.bias"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises((StartupError, ValueError), match=r"lacks layers\.1\.attn\.f_proj\.bias"):
        make_config(folder)
