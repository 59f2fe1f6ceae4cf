"""Which layers of a packed checkpoint our kernels take on a GPU, and what is refused there. There
is no GPU: vLLM's modules are told that there is one, nothing is launched."""

from __future__ import annotations

import importlib
from typing import Any

import pytest
import torch
from torch import nn
from vllm.model_executor.layers.linear import ReplicatedLinear
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms.interface import DeviceCapability, Platform, PlatformEnum

from vllm_attn.report import StartupError
from vllm_quant.config import PackedConfig

LINEAR = "vllm.model_executor.kernels.linear"
QUANTIZATION = "vllm.model_executor.layers.quantization"
MODULES = (
    "vllm_quant.config",
    LINEAR,
    f"{LINEAR}.mixed_precision.marlin",
    f"{QUANTIZATION}.utils.marlin_utils",
    f"{QUANTIZATION}.compressed_tensors.compressed_tensors",
)
"""Which decide by the platform, of those that decide about these layers."""


class Gpu(Platform):
    """An H100, or what `capability` says."""

    _enum = PlatformEnum.CUDA
    device_name = device_type = "cuda"
    capability = DeviceCapability(9, 0)

    @classmethod
    def get_device_capability(cls, device_id: int = 0) -> DeviceCapability:
        return cls.capability


@pytest.fixture(autouse=True)
def gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """In place of the CPU."""
    for name in MODULES:
        monkeypatch.setattr(importlib.import_module(name), "current_platform", Gpu())


def config(bits: int, group: int | None, zeros: str = "none") -> PackedConfig:
    """Return a checkpoint's configuration; `zeros` names its zero points: quantized values
    ("codes"), halves between them, or none."""
    weights: dict[str, Any] = {
        "num_bits": bits,
        "type": "int",
        "symmetric": zeros == "none",
        "strategy": "group" if group else "channel",
        "group_size": group,
    }
    if zeros == "half":
        weights["zp_dtype"] = "torch.float16"
    groups = {"all": {"targets": ["Linear", "VocabParallelEmbedding"], "weights": weights}}
    made: PackedConfig = PackedConfig.from_config(
        {"quant_method": "compressed-tensors", "format": "pack-quantized", "config_groups": groups}
    )
    return made


def layer(kind: type[nn.Module], inputs: int, dtype: torch.dtype) -> Any:
    """As far as it is built when vLLM asks for its method."""
    made: Any = object.__new__(kind)
    nn.Module.__init__(made)
    made.input_size, made.output_size, made.params_dtype = inputs, 256, dtype
    return made


def scheme(config: PackedConfig, inputs: int = 512, dtype: torch.dtype = torch.bfloat16) -> str:
    """Whose a linear layer is."""
    linear = layer(ReplicatedLinear, inputs, dtype)
    config.get_quant_method(linear, "model.layers.0.mlp.down_proj")
    return type(linear.scheme).__name__


@pytest.mark.parametrize(
    ("bits", "group", "zeros"), [(4, 128, "none"), (4, 64, "codes"), (8, None, "none")]
)
def test_vllm_keeps_what_it_has_kernels_for(bits: int, group: int | None, zeros: str) -> None:
    assert scheme(config(bits, group, zeros)) == "CompressedTensorsWNA16"


@pytest.mark.parametrize(
    ("bits", "group", "zeros", "inputs", "dtype"),
    [
        *((bits, 64, "codes", 512, torch.bfloat16) for bits in (2, 3, 5, 6, 7)),
        (4, 128, "none", 704, torch.bfloat16),  # the last group is short
        (4, 64, "half", 512, torch.bfloat16),
        (4, 64, "none", 512, torch.float32),
    ],
)
def test_the_others_are_ours(
    bits: int, group: int, zeros: str, inputs: int, dtype: torch.dtype
) -> None:
    assert scheme(config(bits, group, zeros), inputs, dtype) == "PackedScheme"


def test_act_order_is_ours() -> None:
    """vLLM refuses it."""
    entry = {"num_bits": 4, "symmetric": True, "strategy": "group", "group_size": 64}
    groups = {"all": {"targets": ["Linear"], "weights": entry | {"actorder": "group"}}}
    made = PackedConfig.from_config({"format": "pack-quantized", "config_groups": groups})
    assert scheme(made) == "PackedScheme"


def test_embeddings_are_ours() -> None:
    embedding = layer(VocabParallelEmbedding, 512, torch.bfloat16)
    method = config(4, 128).get_quant_method(embedding, "model.embed_tokens")
    assert type(method).__name__ == "PackedEmbeddingMethod"


def test_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(StartupError, match="groups of 16 columns: the GPU kernels take multiples"):
        scheme(config(3, 16))
    monkeypatch.setattr(Gpu, "capability", DeviceCapability(7, 5))
    with pytest.raises(StartupError, match=r"need a GPU of compute capability 8\.0 or later"):
        scheme(config(3, 64))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(StartupError, match="in Triton, which is not installed"):
        scheme(config(3, 64))
