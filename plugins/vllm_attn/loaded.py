"""What is checked after a model is loaded: which attention its layers run.

A model may choose the backend of its layers itself (MiMo-V2 does); vLLM then never asks the
platform, which refuses another backend than the chosen one.
"""

from __future__ import annotations

from typing import Any

from vllm.config import get_layers_from_vllm_config
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.layers.mamba.abstract import MambaBase

from vllm_attn import names
from vllm_attn.backend import VariantImpl
from vllm_attn.report import StartupError


def check_layers(vllm_config: Any) -> None:
    """Refuse a loaded model in which another attention than the chosen variant would run.

    Layers that hold a state of their own (Mamba, linear attention) are no attention to choose.

    Args:
        vllm_config: with the layers that the model registered in it.

    Raises:
        StartupError: with one line that names the first such layer.
    """
    name = names.variant_of(vllm_config.attention_config.backend)
    if name is None:
        return
    layers: dict[str, Any] = get_layers_from_vllm_config(vllm_config, AttentionLayerBase)
    layers = {key: layer for key, layer in layers.items() if not isinstance(layer, MambaBase)}
    for layer_name, layer in layers.items():
        impl = getattr(layer, "impl", None)
        if not isinstance(impl, VariantImpl) or impl.variant.name != name:
            raise StartupError(
                f"layer {layer_name} would run {layer.get_attn_backend().get_name()} instead of "
                f"{name} attention: this model chooses its attention itself and cannot be served "
                f"with {name}"
            )
        value_size = getattr(layer, "head_size_v", impl.head_size)
        if value_size != impl.head_size:
            raise StartupError(
                f"layer {layer_name} has values of size {value_size} and keys of size "
                f"{impl.head_size}: {name} attention needs them to be the same"
            )
    if not layers and vllm_config.parallel_config.pipeline_parallel_size == 1:
        raise StartupError(
            f"{vllm_config.model_config.model} has no attention layer that could run {name}: drop "
            "--attention-backend"
        )
