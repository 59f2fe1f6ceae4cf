"""Fake quantization of inputs and of the cache, for every variant."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedModel

from attn_kernels import variant_names
from attn_kernels.kv_quant import KV_FORMATS
from attnserve.evaluation.scorers import load
from quant.activations import QuantizedCache, fake_quantize, float8, quantize_inputs
from quant.config import QuantConfig, SearchSpace
from quant.model import largest_inputs, linears
from quant.schemes.rtn import rtn
from quant_kernels.weight import QuantSpec
from tests.tiny import tiny_checkpoint, write_tiny_llama

NAMES = [*variant_names(), "llama"]


def model_of(name: str, folder: Path) -> PreTrainedModel:
    if name == "llama":
        return load(write_tiny_llama(folder / name))
    return load(tiny_checkpoint(folder / name, name, num_hidden_layers=2))


def ids(model: PreTrainedModel, tokens: int = 24) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, model.config.vocab_size, (2, tokens), generator=generator)


@pytest.mark.parametrize("symmetric", [True, False])
def test_each_row_has_its_scale(symmetric: bool) -> None:
    values = (
        torch.randn(2, 3, 16, generator=torch.manual_seed(0)) * torch.tensor([1, 10, 100])[:, None]
    )
    found = fake_quantize(values, 4, symmetric)
    plain = rtn(values.reshape(6, 16), QuantSpec(4, None, symmetric)).dequantize()
    torch.testing.assert_close(found, plain.view_as(values))


def test_inputs_of_layers() -> None:
    layer = nn.Linear(8, 4, bias=False)
    x = torch.randn(5, 8, generator=torch.manual_seed(0))
    exact = layer(x)
    quantize_inputs({"layer": layer}, 3)
    torch.testing.assert_close(layer(x), fake_quantize(x, 3, True) @ layer.weight.T)
    assert not torch.allclose(layer(x), exact)


def test_static_scales_cut_off() -> None:
    layer = nn.Linear(3, 3, bias=False)
    layer.weight.data = torch.eye(3)
    quantize_inputs({"layer": layer}, 8, {"layer": 1.0})
    found = layer(torch.tensor([[0.5, -0.013, 3.0], [-9.0, 1.0, 0.0]]))
    torch.testing.assert_close(
        found, torch.tensor([[0.5, -0.013, 1.0], [-1.0, 1.0, 0.0]]), atol=0.008, rtol=0
    )


def test_largest_inputs(softpick: Path) -> None:
    model = load(softpick)
    layers, texts = linears(model), ids(model)
    found = largest_inputs(model, layers, texts)
    name = "model.layers.0.self_attn.q_proj"
    with torch.inference_mode():
        first = model.model.layers[0].input_layernorm(model.model.embed_tokens(texts))
    assert found[name] == pytest.approx(float(first.abs().max())) and list(found) == list(layers)


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_cache_bits(name: str, tmp_path: Path) -> None:
    """The fewer bits, the further from the exact cache; keys and values are those of the format."""
    model = model_of(name, tmp_path)
    texts = ids(model)
    exact_cache = DynamicCache()
    exact = model(input_ids=texts, past_key_values=exact_cache, use_cache=True).logits
    errors = []
    configs = SearchSpace(targets=["kv"], bits=[8, 4, 2]).configs()
    assert [config.kv_format for config in configs] == [*KV_FORMATS, None]
    for config in configs:
        cache = QuantizedCache(model.config, config)
        logits = model(input_ids=texts, past_key_values=cache, use_cache=True).logits
        errors.append(float((logits - exact).square().mean().sqrt() / exact.std()))
        heads = model.config.num_key_value_heads
        for (keys, values, *_), (old_keys, old_values, *_) in zip(cache, exact_cache, strict=True):
            for found in (keys, values[:, :heads]):
                quantized = {len(row.unique()) for row in found.flatten(0, 2)}
                assert config.kv == 4 or max(quantized) <= 2 ** (config.kv or 0)
            assert values.shape == old_values.shape and keys.shape == old_keys.shape
        # The first layer's keys, which have no error yet, are those of the model.
        first, old = cache.layers[0].keys, exact_cache.layers[0].keys
        kind = KV_FORMATS.get(config.kv_format or "")
        rounded = kind.rounded(old) if kind else fake_quantize(old, 2, False)
        torch.testing.assert_close(first, rounded)
    assert errors[0] < errors[1] < errors[2] and errors[0] < 0.07 < errors[2]


@pytest.mark.parametrize("name", NAMES)
@torch.inference_mode()
def test_decoding_meets_the_cache_of_a_prefill(name: str, tmp_path: Path) -> None:
    """A token at a time gives what all at once give: each is quantized once, when it is stored."""
    model = model_of(name, tmp_path)
    texts, config = ids(model, 10), QuantConfig(kv=4, symmetric=True)
    whole = QuantizedCache(model.config, config)
    logits = model(input_ids=texts, past_key_values=whole, use_cache=True).logits
    cache = QuantizedCache(model.config, config)
    steps = [
        model(input_ids=texts[:, i : i + 1], past_key_values=cache, use_cache=True).logits
        for i in range(10)
    ]
    torch.testing.assert_close(torch.cat(steps, 1), logits, atol=1e-3, rtol=1e-3)


def test_float8() -> None:
    """Three bits of mantissa, and the largest value for what is larger."""
    x = torch.tensor([1.0, 1.06, 1.07, -300.0, 1e4, -1e4, 2.0**-9, 2.0**-11])
    assert float8(x).tolist() == [1.0, 1.0, 1.125, -288.0, 448.0, -448.0, 2.0**-9, 0.0]
