"""The vLLM plugin for weights of 2 to 8 bits.

vLLM 0.32 has no CPU kernel for packed weights but one for 4 bits, which needs AVX-512. This plugin
serves every width of compressed-tensors' `pack-quantized` format with `quant_kernels`, and
two-level scales; on a CPU GPTQ, AWQ and bitsandbytes, too; on a GPU what vLLM has no kernel for.
Other formats, and other devices, stay vLLM's.
"""

from __future__ import annotations

import functools
from typing import Any

from quant_kernels.formats import READERS
from quant_kernels.formats.packed import METHOD

ALIASES = ("auto_gptq", "gptq_marlin", "auto_awq", "awq_marlin")
"""What vLLM calls GPTQ and AWQ besides; its classes of these names would claim the checkpoints."""


@functools.cache
def register() -> None:
    """Entry point `vllm.general_plugins`, for vLLM on CPUs and GPUs. Idempotent."""
    from vllm.model_executor.layers.quantization import register_quantization_config
    from vllm.model_executor.layers.quantization.base_config import QuantizationConfig
    from vllm.platforms import current_platform

    class LazyConfig(QuantizationConfig):
        """Stands for `PackedConfig` and `ForeignConfig`, whose imports take seconds in each of
        vLLM's processes, until a checkpoint has one. Never an instance: what vLLM asks of those
        stays abstract."""

        @classmethod
        def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
            from vllm_attn.report import StartupError
            from vllm_quant.config import PackedConfig
            from vllm_quant.foreign import ForeignConfig

            kind = ForeignConfig if config.get("quant_method") in READERS else PackedConfig
            try:
                made: QuantizationConfig = kind.from_config(config)
            except StartupError:
                raise
            except Exception as error:  # whatever values of other kinds lead to
                why = " ".join(str(error).split()) or repr(error)
                raise StartupError(
                    f"quantization_config of config.json cannot be read: {why}"
                ) from error
            return made

        @staticmethod
        def get_config_filenames() -> list[str]:
            return []

    if current_platform.is_cpu() or current_platform.is_cuda_alike():
        for name in ("compressed-tensors", METHOD):
            register_quantization_config(name)(LazyConfig)
    if current_platform.is_cpu():
        for name in (*READERS, *ALIASES):
            register_quantization_config(name)(LazyConfig)
