"""Checkpoints that other libraries quantized (GPTQ, AWQ, bitsandbytes), on a CPU.

Their layers are read one by one while the checkpoint is loaded (`quant_kernels.formats`) and served
as if compressed-tensors had packed them. What is no integer times a scale (NF4) is dequantized.
"""

from __future__ import annotations

from typing import Any

import torch
from vllm.model_executor.layers.fused_moe import RoutedExperts

from quant_kernels.formats import Reader, reader_of
from quant_kernels.formats.packed import FORMAT, HEAD, config_of, weights_entry
from vllm_attn.report import StartupError
from vllm_quant.config import PackedConfig


class ForeignConfig(PackedConfig):
    """Their configuration.

    Attributes:
        reader: of the checkpoint; `vllm_attn.patches` puts it between the files and the model.
        library: its `quant_method`.
    """

    reader: Reader
    library: str

    def get_name(self) -> Any:
        """Return the method that the checkpoint names."""
        return self.library

    @classmethod
    def from_config(cls, config: dict[str, Any]) -> ForeignConfig:
        """Read the entry of config.json.

        Raises:
            StartupError: with one line: it cannot be served.
        """
        try:
            reader = reader_of(config)
        except ValueError as error:
            raise StartupError(str(error)) from None
        groups = []
        if reader.spec is not None:
            targets = ["Linear"] if HEAD in reader.ignore else ["Linear", HEAD]
            entry = weights_entry(reader.spec, act_order=reader.act_order)
            groups = [(targets, entry, FORMAT)]
        made: ForeignConfig = super().from_config(config_of(groups, reader.ignore))
        made.reader = reader
        made.library = config["quant_method"]
        return made

    def get_quant_method(self, layer: torch.nn.Module, prefix: str) -> Any:
        """Return the method of one layer.

        Raises:
            StartupError: it is a layer of experts.
        """
        if isinstance(layer, RoutedExperts):
            raise StartupError(
                f"{prefix} has experts, which are not served quantized with {self.library} on a "
                "CPU: use the unquantized checkpoint"
            )
        return super().get_quant_method(layer, prefix)
