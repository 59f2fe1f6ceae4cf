"""Linear layers with packed weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
)

from quant_kernels import multiply
from quant_kernels.panels import CHUNK
from vllm_attn.report import StartupError
from vllm_quant.device import CAPABILITY
from vllm_quant.layer import Format, weight_of


class PackedScheme(CompressedTensorsScheme):
    """The scheme of one linear layer, as `CompressedTensorsLinearMethod` asks for it.

    Args:
        format: of the layer's weight.
    """

    def __init__(self, format: Format) -> None:
        self.format = format

    @classmethod
    def get_min_capability(cls) -> int:
        """Return the compute capability that GPUs need."""
        return CAPABILITY

    def create_weights(
        self,
        layer: nn.Module,
        output_partition_sizes: list[int],
        input_size: int,
        input_size_per_partition: int,
        output_size: int,
        weight_loader: Callable[..., None],
        **kwargs: Any,
    ) -> None:
        """Register the layer's parameters.

        Raises:
            StartupError: tensor parallelism would cut through a group.
        """
        group_size = self.format.group_size
        if input_size_per_partition != input_size and input_size_per_partition % (
            group_size or CHUNK
        ):
            raise StartupError(
                f"tensor parallelism gives each rank {input_size_per_partition} columns of packed "
                f"weights, which is no multiple of {group_size or CHUNK}: use a smaller "
                "--tensor-parallel-size"
            )
        self.inputs = input_size_per_partition
        outputs, parts = sum(output_partition_sizes), len(output_partition_sizes)
        self.format.create(layer, outputs, self.inputs, output_size, weight_loader, parts)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bring them into the kernels' order."""
        self.format.arrange(layer, self.inputs)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x @ weight.T + bias`."""
        product = multiply(x, weight_of(layer))
        return product if bias is None else product + bias
