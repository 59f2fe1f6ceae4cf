"""What our kernels need of a GPU, and which layers stay vLLM's there."""

from __future__ import annotations

import importlib.util
from typing import Any

import torch
from torch import nn
from vllm.model_executor.kernels.linear import MPLinearLayerConfig, choose_mp_linear_kernel
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    compressed_tensors_wNa16 as stock,
)
from vllm.platforms import current_platform

from vllm_attn.report import StartupError
from vllm_quant.layer import Format

CAPABILITY = 80
"""Of NVIDIA's GPUs, 8.0: the oldest that the kernels are compiled for."""


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
    beyond compressed-tensors' format: a short last group, zero points between codes.
    """
    if not isinstance(layer, LinearBase):
        return False
    short = format.group_size is not None and layer.input_size % format.group_size
    between = not format.symmetric and format.zero_dtype == torch.float16
    if short or between or layer.params_dtype == torch.float32:
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
