"""compressed-tensors' configuration, with packed weights given to our kernels.

vLLM's hook for it is `register_quantization_config`, which replaces a format's class by name.
"""

from __future__ import annotations

import importlib.util
from copy import deepcopy
from typing import Any

import torch
from torch import nn
from vllm.logger import init_logger
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.fused_moe import RoutedExperts
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.compressed_tensors.compressed_tensors import (
    CompressedTensorsConfig,
    CompressedTensorsLinearMethod,
)
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    compressed_tensors_wNa16 as stock,
)
from vllm.model_executor.layers.vocab_parallel_embedding import VocabParallelEmbedding
from vllm.platforms import current_platform

from quant_kernels.formats.packed import FORMAT, TWO_LEVEL, is_act_order
from quant_kernels.ops import load
from quant_kernels.panels import CHUNK
from vllm_attn.patches import check_every_load
from vllm_attn.report import StartupError
from vllm_quant.layer import Format
from vllm_quant.methods import CAPABILITY, PackedEmbeddingMethod, PackedScheme

"""The format of a config group whose scales are two-level ones: no format of compressed-tensors, so
that checkpoints with it name `attnserve` as their method."""

logger = init_logger(f"vllm.{__name__}")


class PackedConfig(CompressedTensorsConfig):
    """Weight-only integers in the format `pack-quantized` are ours, on a GPU where vLLM has no
    kernel for them; all else is vLLM's."""

    def get_name(self) -> Any:
        """Return the method that the checkpoint names."""
        return (self.config or {}).get("quant_method", super().get_name())

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> PackedConfig:
        """Read the entry of config.json. vLLM refuses act order, which is ours."""
        config = deepcopy(config)
        ordered: dict[str, str] = {}
        for group in (config.get("config_groups") or {}).values():
            entry = group.get("weights") or {}
            if is_act_order(entry):
                ordered |= dict.fromkeys(group["targets"], entry["actorder"])
                entry["actorder"] = "weight"
        made: PackedConfig = super().from_config(config)
        for target, act_order in ordered.items():
            made.target_scheme_map[target]["weights"].actorder = act_order
        return made

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method of one layer.

        Raises:
            StartupError: packed weights that the kernels do not take, or experts that vLLM's do
                not.
        """
        check_every_load()
        if isinstance(layer, RoutedExperts):
            try:
                return super().get_quant_method(layer, prefix)
            except (NotImplementedError, ValueError, AssertionError) as error:
                raise StartupError(
                    f"{prefix} has experts, for which vLLM has no kernel here ({error}): use the "
                    "unquantized checkpoint"
                ) from error
        if not isinstance(layer, LinearBase | VocabParallelEmbedding) or self.transform_config:
            return super().get_quant_method(layer, prefix)
        scheme = self.get_scheme_dict(layer, prefix)
        if not scheme or not is_packed(scheme):
            return super().get_quant_method(layer, prefix)
        weights: Any = scheme["weights"]
        format = Format(
            weights.num_bits,
            weights.group_size,
            weights.symmetric,
            weights.zp_dtype or torch.int8,
            is_act_order({"actorder": weights.actorder}),
            scheme["format"] == TWO_LEVEL,
        )
        on_gpu = current_platform.is_cuda_alike()
        if on_gpu and stays_vllms(layer, format):
            return super().get_quant_method(layer, prefix)
        kernels = "GPU kernels" if on_gpu else "CPU kernels"
        small = format.two_level and format.group_size == CHUNK // 2
        if format.group_size is not None and format.group_size % CHUNK and not small:
            raise StartupError(
                f"{prefix or 'the embedding'} has groups of {format.group_size} columns: the "
                f"{kernels} take multiples of {CHUNK}, or whole rows"
            )
        if isinstance(layer, VocabParallelEmbedding) and format.act_order:
            raise StartupError(
                f"{prefix or 'the embedding'} is quantized in act order, which only linear layers "
                "can be: quantize it without"
            )
        if on_gpu:
            require_kernels()
        else:
            load(format.bits)  # built, or a warning given, before anything else is loaded
        logger.info_once("Packed weights of %d bits run in attnserve's %s.", format.bits, kernels)
        if isinstance(layer, VocabParallelEmbedding):
            return PackedEmbeddingMethod(format)
        # The class that vLLM's linear layers know how to load.
        layer.scheme = PackedScheme(format)
        return CompressedTensorsLinearMethod(self)


def is_packed(scheme: dict[str, Any]) -> bool:
    """Return whether a layer's scheme is one that `quant_kernels` computes: packed integers of 2 to
    8 bits with scales of rows or groups, activations as they are."""
    weights = scheme["weights"]
    return (
        scheme["format"] in (FORMAT, TWO_LEVEL)
        and scheme.get("input_activations") is None
        and scheme.get("output_activations") is None
        and weights.type == "int"
        and weights.num_bits in range(2, 9)
        and weights.strategy in ("channel", "group")
        and not weights.dynamic
    )


def require_kernels() -> None:
    """Make sure of the Triton kernels.

    Raises:
        StartupError: this environment or GPU cannot run them.
    """
    if importlib.util.find_spec("triton") is None:
        raise StartupError(
            "attnserve multiplies packed weights on a GPU in Triton, which is not installed: "
            "pip install triton"
        )
    if current_platform.is_cuda() and not current_platform.has_device_capability(CAPABILITY):
        raise StartupError(
            "attnserve's kernels for packed weights need a GPU of compute capability 8.0 or "
            "later: serve this checkpoint on a CPU"
        )


def stays_vllms(layer: nn.Module, format: Format) -> bool:
    """Return whether one of vLLM's own kernels takes a layer: they are known, ours are not timed.

    Embeddings never (vLLM has no zero points and no tied head there), nor float32, nor what is
    beyond compressed-tensors' format: a short last group, zero points between quantized values; nor
    act order.
    """
    if not isinstance(layer, LinearBase):
        return False
    short = format.group_size is not None and layer.input_size % format.group_size
    between = not format.symmetric and format.zero_dtype.is_floating_point
    if format.two_level or format.act_order or short or between:
        return False
    if layer.params_dtype == torch.float32:
        return False
    types: Any = stock.WNA16_SUPPORTED_TYPES_MAP
    if not format.symmetric:
        types = stock.WNA16_ZP_SUPPORTED_TYPES_MAP
    shape = (layer.input_size, layer.output_size)
    config = MPLinearLayerConfig(
        full_weight_shape=shape,
        partition_weight_shape=shape,
        weight_type=types[format.bits],
        act_type=layer.params_dtype,
        group_size=format.group_size or -1,
        zero_points=not format.symmetric,
    )
    try:
        choose_mp_linear_kernel(config)
    except ValueError:  # it lists why each of them does not
        return False
    return True
