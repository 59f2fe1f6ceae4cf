"""compressed-tensors' configuration class without what it needs.

Importing that takes seconds, and plugins are loaded in each of vLLM's processes.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.quantization.base_config import QuantizationConfig


class LazyConfig(QuantizationConfig):
    """Stands for `PackedConfig` until a checkpoint has one. Never an instance."""

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

    @classmethod
    def get_min_capability(cls) -> int:
        """Return anything: asked of instances only, which are `PackedConfig`."""
        return -1

    def get_name(self) -> str:
        """Return the name of the format."""
        return "compressed-tensors"

    def get_supported_act_dtypes(self) -> list[torch.dtype]:
        """Raise: abstract in vLLM; asked of instances only, which are `PackedConfig`."""
        raise NotImplementedError  # never an instance

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Raise: abstract in vLLM; asked of instances only, which are `PackedConfig`."""
        raise NotImplementedError  # never an instance
