"""compressed-tensors' configuration class without what it needs.

Importing that takes seconds, and plugins are loaded in each of vLLM's processes.
"""

from __future__ import annotations

from typing import Any

from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


class LazyConfig(QuantizationConfig):
    """Stands for `PackedConfig` until a checkpoint has one. Never an instance: what vLLM asks of
    instances stays abstract."""

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> QuantizationConfig:
        """Return the configuration that `quantization_config` in `config.json` is."""
        from vllm_quant.config import PackedConfig

        made: QuantizationConfig = PackedConfig.from_config(config)
        return made

    @staticmethod
    def get_config_filenames() -> list[str]:
        """Return the files beside `config.json`: none."""
        return []
