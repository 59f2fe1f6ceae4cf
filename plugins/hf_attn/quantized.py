"""Packed checkpoints in transformers: compressed-tensors' `pack-quantized`, whatever the bits.

transformers gives that format to the library compressed-tensors, which misreads densely packed 3,
5, 6 and 7 bits and has no embeddings, short groups or zero points between quantized values. After
`import hf_attn` weights are read as they are served (`quant_kernels.formats.packed`) and computed
with in the model's dtype. The format's other kinds stay the library's.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import ConversionOps, WeightConverter
from transformers.quantizers import auto
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from quant_kernels.formats.packed import METHOD, PARTS, entry_for, is_packed, read_stored

STOCK = "compressed-tensors"


class PackedConfig(QuantizationConfigMixin):
    """The entry `quantization_config` of a packed checkpoint, as it is."""

    dequantize = True
    """A loaded model is a plain one: saving it writes its weights unquantized."""

    def __init__(self, **entry: Any) -> None:
        self.entry = entry
        self.quant_method = entry["quant_method"]

    @classmethod
    def from_dict(
        cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any
    ) -> Any:
        """Return the configuration; transformers' own for what is not packed."""
        if not is_packed(config_dict):
            return STOCK_CONFIG.from_dict(config_dict, return_unused_kwargs, **kwargs)
        made = cls(**config_dict)
        return (made, kwargs) if return_unused_kwargs else made

    def to_dict(self) -> dict[str, Any]:
        """Return the entry."""
        return dict(self.entry)


class PackedQuantizer(HfQuantizer):
    """Loads a packed checkpoint into the model's own modules."""

    requires_calibration = True
    is_trainable = True
    quantization_config: PackedConfig

    def __new__(cls, quantization_config: Any, **kwargs: Any) -> Any:
        """Return transformers' own quantizer for what is not packed."""
        if not isinstance(quantization_config, PackedConfig):
            return STOCK_QUANTIZER(quantization_config, **kwargs)
        return super().__new__(cls)

    def is_serializable(self) -> bool:
        """Return whether a loaded model can be saved: unquantized."""
        return True

    def get_weight_conversions(self) -> list[WeightConverter]:
        """Return how a layer's tensors become its weight."""
        sources = [f"{part}$" for part in PARTS]
        return [WeightConverter(sources, "weight", [Dequantize(self.quantization_config.entry)])]

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> Any:
        """Let the model be saved with the weights that it computes with."""
        model._weight_conversions = [
            conversion
            for conversion in model._weight_conversions
            if not any(isinstance(op, Dequantize) for op in getattr(conversion, "operations", ()))
        ]
        return model


class Dequantize(ConversionOps):
    """One layer's tensors to its weight.

    Args:
        entry: `quantization_config` of config.json.
    """

    def __init__(self, entry: dict[str, Any]) -> None:
        self.entry = entry

    def convert(
        self,
        input_dict: dict[str, Any],
        source_patterns: list[str],
        target_patterns: list[str],
        full_layer_name: str = "",
        model: PreTrainedModel | None = None,
        **kwargs: Any,
    ) -> dict[str, Tensor]:
        """Return the weight, in the model's dtype."""
        assert model is not None
        layer = full_layer_name.removesuffix(".weight")
        module = model.get_submodule(layer)
        entry = entry_for(self.entry, layer, type(module).__name__)
        parts = {pattern.removesuffix("$"): found[0] for pattern, found in input_dict.items()}
        return {"weight": read_stored(parts, entry, layer).dequantize().to(module.weight.dtype)}


STOCK_CONFIG: Any = auto.AUTO_QUANTIZATION_CONFIG_MAPPING[STOCK]
STOCK_QUANTIZER: Any = auto.AUTO_QUANTIZER_MAPPING[STOCK]


def register_packed_checkpoints() -> None:
    """Let transformers load packed checkpoints with this module.

    `register_quantizer` takes no name that is there already.
    """
    for name in (STOCK, METHOD):
        auto.AUTO_QUANTIZATION_CONFIG_MAPPING[name] = PackedConfig
        auto.AUTO_QUANTIZER_MAPPING[name] = PackedQuantizer
