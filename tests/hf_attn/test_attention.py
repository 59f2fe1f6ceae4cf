"""Variants as attention functions of stock transformers models."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
)

from attn_kernels import get_variant, variant_names
from attn_kernels.reference import attention
from hf_attn.attention import attention_forward
from tests.reference_model import reference_greedy
from tests.tiny_models import tiny_model

TINY: dict[str, Any] = {
    "vocab_size": 128,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "initializer_range": 0.3,
    "bos_token_id": 0,
    "eos_token_id": 1,
}
IDS = torch.tensor([[5, 77, 31, 8, 120, 64, 3, 99]])
FREE = [name for name in variant_names() if not get_variant(name).tensors]


def stock(config: PreTrainedConfig, implementation: str) -> PreTrainedModel:
    torch.manual_seed(0)
    model: PreTrainedModel = AutoModelForCausalLM.from_config(
        config, attn_implementation=implementation
    )
    return model.eval()


def generate(model: PreTrainedModel, **options: Any) -> list[int]:
    output = model.generate(
        IDS,
        attention_mask=torch.ones_like(IDS),
        max_new_tokens=16,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
        **options,
    )
    tokens: list[int] = output[0, IDS.shape[1] :].tolist()
    return tokens


@pytest.mark.parametrize("name", FREE)
def test_stock_llama_generates_the_references_tokens(name: str, tmp_path: Path) -> None:
    model = stock(LlamaConfig(**TINY), name)
    model.save_pretrained(tmp_path)
    expected = reference_greedy(tmp_path, IDS[0].tolist(), 16, {"name": name})
    assert min(expected.margins) > 1e-3
    assert generate(model, use_cache=get_variant(name).stateful is False) == expected.tokens


@pytest.mark.parametrize(
    "config",
    [
        LlamaConfig(**TINY),
        MistralConfig(**TINY, sliding_window=4),
        Qwen2Config(**TINY, use_sliding_window=True, sliding_window=4, max_window_layers=1),
    ],
    ids=lambda config: config.model_type,
)
def test_softmax_is_what_stock_models_compute(config: PreTrainedConfig) -> None:
    ours, eager = stock(config, "softmax"), stock(config, "eager")
    padding = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1]])
    with torch.no_grad():
        for mask in (None, padding):
            logits, expected = (
                model(input_ids=IDS, attention_mask=mask).logits for model in (ours, eager)
            )
            torch.testing.assert_close(logits[:, 2:], expected[:, 2:], atol=1e-4, rtol=1e-4)
    assert generate(ours) == generate(eager)


@pytest.mark.parametrize("name", [name for name in FREE if name != "softmax"])
def test_the_variant_runs_and_not_another(name: str) -> None:
    with torch.no_grad():
        logits, softmax = (
            stock(LlamaConfig(**TINY), implementation)(input_ids=IDS).logits
            for implementation in (name, "softmax")
        )
    assert (logits - softmax).abs().max() > 0.01


def test_parameters_come_from_the_config() -> None:
    """Those of the variant that runs; another than the configuration names does not."""

    def logits(implementation: str, **variant: Any) -> Tensor:
        model = stock(LlamaConfig(**TINY, attention_variant=variant or None), implementation)
        with torch.no_grad():
            result: Tensor = model(input_ids=IDS).logits
        return result

    assert not torch.equal(logits("lssar", name="lssar", power=3.0), logits("lssar"))
    assert torch.equal(logits("lssar", name="lssar", power=15.0), logits("lssar"))
    with pytest.raises(ValueError, match="names lssar attention"):
        logits("softmax", name="lssar", power=3.0)
    assert logits("ssmax", name="ssmax", scale=0.2).isfinite().all()


def test_learned_tensors_are_required() -> None:
    model = stock(LlamaConfig(**TINY), "ssmax")
    with pytest.raises(ValueError, match="ssmax_scale, which LlamaAttention lacks"):
        model(input_ids=IDS)


def test_gates_are_required() -> None:
    model = stock(LlamaConfig(**TINY), "forgetting")
    with pytest.raises(ValueError, match="needs gates, which LlamaAttention does not compute"):
        model(input_ids=IDS)


def test_stateful_variants_need_the_history() -> None:
    model = stock(LlamaConfig(**TINY), "selective")
    with pytest.raises(ValueError, match="LlamaAttention does not hold: pass use_cache=False"):
        generate(model, use_cache=True)


@pytest.mark.parametrize(("kind", "name"), [("gpt_oss", "sinks"), ("gemma2", "softmax")])
def test_sinks_and_soft_caps_are_the_models(kind: str, name: str) -> None:
    """gpt-oss' sinks and Gemma 2's caps, beside transformers' own; windows in every other layer."""
    model = tiny_model(kind)
    ids = torch.randint(2, 512, (2, 80), generator=torch.Generator().manual_seed(0))
    logits = []
    for implementation in ("eager", name):
        model.set_attn_implementation(implementation)
        with torch.inference_mode():
            logits.append(model(input_ids=ids).logits)
    assert logits[0].std() > 0.1
    torch.testing.assert_close(logits[1], logits[0], rtol=0, atol=1e-4 * float(logits[0].std()))


class Module(torch.nn.Module):
    """An attention module of no particular model."""


def tensors(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return queries, keys, values and the causal mask; 4 heads, 2 KV heads, 6 tokens."""
    torch.manual_seed(1)
    q, k, v = (torch.randn(1, heads, 6, 8).to(dtype) for heads in (4, 2, 2))
    return q, k, v, torch.ones(1, 1, 6, 6, dtype=torch.bool).tril()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"attention_mask": None}, "needs a bool mask .* not none"),
        ({"attention_mask": torch.zeros(1, 1, 6, 6)}, "not a mask of torch.float32"),
        ({"dropout": 0.1}, "has no dropout: set attention_dropout to 0"),
        ({"softcap": 30.0}, "not defined with this model's softcap"),
        ({"s_aux": torch.zeros(4)}, "not defined with this model's s_aux"),
        ({"position_bias": torch.zeros(4)}, "not defined with this model's position_bias"),
    ],
)
def test_what_is_not_defined_is_refused(changed: dict[str, Any], message: str) -> None:
    q, k, v, mask = tensors()
    with pytest.raises(ValueError, match=message):
        attention_forward("lssa", Module(), q, k, v, **{"attention_mask": mask} | changed)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", FREE)
def test_half_precision_is_computed_in_float32(name: str, dtype: torch.dtype) -> None:
    """The only rounding is that of the inputs and of the output, also under autocast."""
    q, k, v, mask = tensors(dtype)
    expected, _ = attention(get_variant(name), q, k, v)
    with torch.autocast("cpu", torch.bfloat16):
        output, weights = attention_forward(name, Module(), q, k, v, mask)
    assert weights is not None and output.dtype == weights.dtype == dtype
    assert output.shape == (1, 6, 4, 8)
    torch.testing.assert_close(output.transpose(1, 2), expected.to(dtype), atol=1e-5, rtol=1e-2)


@pytest.mark.parametrize("name", FREE)
def test_rows_that_see_nothing_are_zero(name: str) -> None:
    q, k, v, mask = tensors()
    mask = mask.clone()
    mask[..., :2] = False
    output, weights = attention_forward(name, Module(), q, k, v, mask)
    assert (output[:, :2] == 0).all()
    assert weights is not None and (weights[:, :, :2] == 0).all()
    expected, _ = attention(get_variant(name), q[:, :, 2:], k[:, :, 2:], v[:, :, 2:])
    torch.testing.assert_close(
        output[:, 2:].transpose(1, 2).double(), expected, atol=1e-5, rtol=1e-4
    )


def test_names_are_free() -> None:
    """No variant may shadow an implementation of transformers' own."""
    own = {"eager", "sdpa", "flex_attention"}
    own |= {f"flash_attention_{version}" for version in (2, 3, 4)}
    assert own.isdisjoint(variant_names())
    config = LlamaConfig(**TINY)
    assert isinstance(stock(config, "sdpa"), LlamaForCausalLM)
