"""Configurations of other libraries' checkpoints, and what is refused of them, without a model."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import ReplicatedLinear, UnquantizedLinearMethod
from vllm.model_executor.layers.quantization import get_quantization_config
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead

import vllm_quant
from vllm_attn.patches import packed
from vllm_attn.report import StartupError
from vllm_quant.foreign import ForeignConfig
from vllm_quant.layer import agreeing

GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True, "sym": False}
NF4 = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}


def method(entry: dict[str, Any], prefix: str, kind: type[nn.Module] = ReplicatedLinear) -> Any:
    """Return what vLLM gets for a layer, as far as it is built when vLLM asks."""
    layer: Any = object.__new__(kind)
    nn.Module.__init__(layer)
    layer.input_size, layer.output_size, layer.params_dtype = 512, 256, torch.float32
    found = made(entry).get_quant_method(layer, prefix)
    return getattr(layer, "scheme", found)


def made(entry: dict[str, Any]) -> ForeignConfig:
    """Return the configuration as vLLM makes it."""
    vllm_quant.register()
    config: ForeignConfig = get_quantization_config(entry["quant_method"]).from_config(dict(entry))
    return config


def test_layers() -> None:
    scheme = method(GPTQ, "model.layers.0.mlp.down_proj")
    assert (scheme.format.bits, scheme.format.group_size) == (4, 32)
    assert scheme.format.act_order and not scheme.format.symmetric
    scheme = method(GPTQ | {"group_size": -1}, "model.layers.0.mlp.down_proj")
    assert scheme.format.group_size is None and not scheme.format.act_order
    scheme = method({"quant_method": "bitsandbytes", "load_in_8bit": True}, "down_proj")
    assert scheme.format.bits == 8 and scheme.format.symmetric
    assert isinstance(method(NF4, "model.layers.0.mlp.down_proj"), UnquantizedLinearMethod)


def test_layers_that_are_left_out() -> None:
    """GPTQ has patterns for them, AWQ and bitsandbytes parts of names; a head is one unless it is
    named."""
    dynamic = GPTQ | {"dynamic": {r"-:.*\.0\..*": {}}}
    assert isinstance(method(dynamic, "model.layers.0.mlp.down_proj"), UnquantizedLinearMethod)
    assert method(dynamic, "model.layers.1.mlp.down_proj").format.bits == 4
    awq = {
        "quant_method": "awq",
        "bits": 4,
        "group_size": 32,
        "modules_to_not_convert": ["up_proj"],
    }
    assert isinstance(method(awq, "model.layers.0.mlp.up_proj"), UnquantizedLinearMethod)
    assert method(awq, "model.layers.0.mlp.down_proj").format.bits == 4
    assert method(GPTQ, "lm_head", ParallelLMHead) is None
    head = method(GPTQ | {"desc_act": False, "lm_head": True}, "lm_head", ParallelLMHead)
    assert type(head).__name__ == "PackedEmbeddingMethod"


def test_refusals() -> None:
    with pytest.raises(StartupError, match="GPTQ with 5 bits in the format gptq cannot be read"):
        made(GPTQ | {"bits": 5})
    with pytest.raises(StartupError, match="experts, which are not served quantized with gptq"):
        method(GPTQ, "model.layers.0.mlp.experts", RoutedExperts)
    with pytest.raises(StartupError, match="act order, which only linear layers can be"):
        method(GPTQ | {"lm_head": True}, "lm_head", ParallelLMHead)
    with pytest.raises(StartupError, match="groups of 16 columns: the CPU kernels take multiples"):
        method(GPTQ | {"group_size": 16}, "model.layers.0.mlp.down_proj")
    tensors = [("a.qweight", torch.zeros(4, 8, dtype=torch.int32)), ("a.g_idx", torch.zeros(32))]
    with pytest.raises(StartupError, match=r"has no tensor a\.qzeros: it is incomplete"):
        list(packed(tensors, made(GPTQ).reader))


def test_parts_with_other_groups() -> None:
    """A fused layer takes its inputs in one order."""
    layer: Any = nn.Module()
    layer.prefix = "model.layers.0.self_attn.qkv_proj"
    parameter = nn.Parameter(torch.zeros(4, dtype=torch.int32), requires_grad=False)
    load = agreeing(layer)
    load(parameter, torch.tensor([0, 1, 0, 1], dtype=torch.int32), "q")
    load(parameter, torch.tensor([0, 1, 0, 1], dtype=torch.int32), "k")
    assert parameter.tolist() == [0, 1, 0, 1]
    for other in ([0, 0, 1, 1], [0, 1]):
        with pytest.raises(StartupError, match="qkv_proj: its parts have their columns in diff"):
            load(parameter, torch.tensor(other, dtype=torch.int32), "v")
