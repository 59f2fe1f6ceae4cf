"""vLLM's methods of layers with packed weights: linear layers, and token embeddings and heads,
which are one matrix where they are tied."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.quantization.base_config import QuantizeMethodBase
from vllm.model_executor.layers.quantization.compressed_tensors.schemes import (
    CompressedTensorsScheme,
)

from quant_kernels import gather, multiply
from quant_kernels.panels import CHUNK
from vllm_attn.report import StartupError
from vllm_quant.layer import Format, weight_of

CAPABILITY = 80
"""Of NVIDIA's GPUs, 8.0: the oldest that the kernels are compiled for."""


def compile_launches(layer: nn.Module) -> None:
    """Compile what a layer can launch on a GPU, before the first request: vLLM's own first steps
    have as many tokens as a step can have, and few other numbers of them."""
    from attn_kernels.triton import launch
    from quant_kernels import triton

    config = get_current_vllm_config()
    with launch.compile_only():
        triton.compile_launches(
            weight_of(layer),
            config.model_config.dtype,
            config.scheduler_config.max_num_batched_tokens,
        )


def arrange(format: Format, layer: Any, inputs: int) -> None:
    """Bring a layer's parameters into the kernels' order."""
    format.arrange(layer, inputs)
    if layer.weight_packed.is_cuda:
        compile_launches(layer)


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
        whole = math.lcm(self.format.group_size or CHUNK, CHUNK)
        parted = input_size_per_partition != input_size
        if parted and self.format.act_order:
            raise StartupError(
                "the groups of act order reach over the columns of all ranks: use "
                "--tensor-parallel-size 1"
            )
        if parted and input_size_per_partition % whole:
            raise StartupError(
                f"tensor parallelism gives each rank {input_size_per_partition} columns of packed "
                f"weights, which is no multiple of {whole}: use a smaller "
                "--tensor-parallel-size"
            )
        self.inputs = input_size_per_partition
        outputs, parts = sum(output_partition_sizes), len(output_partition_sizes)
        self.format.create(layer, outputs, self.inputs, output_size, weight_loader, parts)

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bring them into the kernels' order."""
        arrange(self.format, layer, self.inputs)

    def apply_weights(self, layer: nn.Module, x: Tensor, bias: Tensor | None) -> Tensor:
        """Return `x @ weight.T + bias`."""
        order: Tensor | None = getattr(layer, "weight_order", None)
        if order is not None:
            x = x.index_select(-1, order)
        product = multiply(x, weight_of(layer))
        return product if bias is None else product + bias


class PackedEmbeddingMethod(QuantizeMethodBase):
    """The method of one `VocabParallelEmbedding` or `ParallelLMHead`.

    Args:
        format: of the layer's weight.
    """

    def __init__(self, format: Format) -> None:
        self.format = format
        self.owner: list[nn.Module] = []
        """The embedding that a head is tied to; in a list, so that it is no part of the head."""

    def create_weights(
        self,
        layer: Any,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        weight_loader: Callable[..., None],
        **kwargs: Any,
    ) -> None:
        """Register the layer's parameters."""
        self.inputs, self.dtype = input_size_per_partition, params_dtype
        outputs = sum(output_partition_sizes)
        self.format.create(layer, outputs, self.inputs, layer.org_vocab_size, weight_loader)

    def tie_weights(self, layer: nn.Module, embed_tokens: nn.Module) -> nn.Module:
        """Let a head compute with the embedding's weight, and have none itself.

        Raises:
            StartupError: the embedding is not packed.
        """
        if not isinstance(embed_tokens.quant_method, PackedEmbeddingMethod):
            raise StartupError(
                "lm_head is tied to embeddings that are not packed, but config.json says that it "
                "is packed: name both in a config group, or neither"
            )
        for name in list(layer._parameters):
            if name.startswith("weight"):
                delattr(layer, name)
        self.owner = [embed_tokens]
        return layer

    def process_weights_after_loading(self, layer: nn.Module) -> None:
        """Bring them into the kernels' order."""
        if not self.owner:
            arrange(self.format, layer, self.inputs)

    def embedding(self, layer: nn.Module, input_: Tensor) -> Tensor:
        """Return rows by token id, `[..., columns]` in the model's dtype."""
        return gather(input_, weight_of(layer), self.dtype)

    def apply(self, layer: nn.Module, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return logits `[..., vocabulary]`."""
        logits = multiply(x, weight_of(self.owner[0] if self.owner else layer))
        return logits if bias is None else logits + bias
