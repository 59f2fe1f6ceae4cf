"""What is quantized besides weights: inputs of linear layers, and the cache's keys and values.

Both are fake: values are put on a spec and stay float32. Nothing here knows an attention variant.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig

from quant_kernels.pack import words
from quant_kernels.weight import QuantSpec


def on_grid(values: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Values `[..., size]` on a spec of their own for each row of `size`, as `rtn` puts weights."""
    spec = QuantSpec(bits, None, symmetric)
    rows = values.reshape(-1, values.shape[-1])
    scales, zeros = spec.qparams(rows)
    return snapped(rows, spec, scales, zeros).view_as(values)


def snapped(values: Tensor, spec: QuantSpec, scales: Tensor, zeros: Tensor | None) -> Tensor:
    """Values at the nearest point of a spec whose parameters broadcast with them."""
    scale, zero = scales.float(), spec.midpoint if zeros is None else zeros.float()
    return (spec.rounded(values / scale + zero) - zero) * scale


@dataclass(frozen=True)
class Activations:
    """Symmetric quantization of the inputs of linear layers.

    Args:
        bits: 2 to 8.
        static: one scale a layer, fitted to calibration texts, beyond which values are cut off;
            else one scale a token, fitted to the token.
    """

    bits: int
    static: bool = False

    def attach(self, layers: Mapping[str, nn.Linear], largest: Mapping[str, float]) -> None:
        """Quantize the layers' inputs from now on.

        Args:
            layers: by name.
            largest: each layer's largest absolute input on the calibration texts, if static.
        """
        for name, layer in layers.items():
            reach = largest[name] if self.static else None
            layer.register_forward_pre_hook(self._hook(reach))

    def _hook(self, reach: float | None) -> Any:
        spec = QuantSpec(self.bits, None, symmetric=True)

        def dynamic(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            return (on_grid(args[0], self.bits, symmetric=True),)

        if reach is None:
            return dynamic
        scale, _ = spec.qparams(torch.tensor([[reach]]))

        def static(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
            return (snapped(args[0], spec, scale, None),)

        return static


def cache_bytes(config: PreTrainedConfig, bits: int | None, symmetric: bool, item: int) -> int:
    """Bytes of a token's keys and values in all layers: codes in 32-bit words, a 16-bit scale and a
    zero point of a byte for each head; `item` bytes a number if `bits` is None."""
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    vectors = 2 * config.num_hidden_layers * config.num_key_value_heads
    one = size * item if bits is None else 4 * words(size, bits) + 2 + (not symmetric)
    return int(vectors * one)


class QuantizedCache(DynamicCache):
    """A cache whose keys (after RoPE) and values lie on a spec for each token and head.

    A query meets its own token's key and value quantized too, as it does where they are written to
    a paged cache first.

    Args:
        config: the model's.
        bits: 2 to 8.
        symmetric: else each token and head has a zero point of its own.
    """

    def __init__(self, config: PreTrainedConfig, bits: int, symmetric: bool) -> None:
        super().__init__()
        self.heads = config.num_key_value_heads
        self.bits, self.symmetric = bits, symmetric

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values `[batch, heads, tokens, head_size]`; returns all of them.

        `hf_attn` keeps a stateful variant's selecting head as one head more, with a key of head 0
        and a query in place of the value. A paged cache stores no query, so that stays exact.
        """
        keys = on_grid(key_states, self.bits, self.symmetric)
        values = value_states.clone()
        values[:, : self.heads] = on_grid(values[:, : self.heads], self.bits, self.symmetric)
        found: tuple[Tensor, Tensor] = super().update(keys, values, layer_idx, *args, **kwargs)
        return found
