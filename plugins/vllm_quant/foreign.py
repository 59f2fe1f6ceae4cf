"""Checkpoints that other libraries quantized (GPTQ, AWQ, bitsandbytes), on a CPU.

Their layers are read one by one while the checkpoint is loaded (`quant_kernels.formats`) and served
as if compressed-tensors had packed them. What is no integer times a scale (NF4) is dequantized.
"""

from __future__ import annotations

from typing import Any

from quant_kernels.formats import Reader, reader_of
from quant_kernels.formats.packed import HEAD, config_of, weights_entry
from vllm_attn.report import StartupError
from vllm_quant.config import PackedConfig


class ForeignConfig(PackedConfig):
    """Their configuration.

    Attributes:
        reader: of the checkpoint; `vllm_attn.patches` puts it between the files and the model.
    """

    reader: Reader

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
            groups = [(targets, weights_entry(reader.spec, act_order=reader.act_order))]
        made: ForeignConfig = super().from_config(config_of(groups, reader.ignore))
        made.reader = reader
        return made
