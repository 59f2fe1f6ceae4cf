"""Quantized inputs of linear layers, and quantized keys and values in the cache.

Both are fake: values are rounded as if they were quantized and stay float32. Nothing here knows an
attention variant.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from quant_kernels.pack import words
from quant_kernels.weight import QuantSpec


def fake_quantize(values: Tensor, bits: int, symmetric: bool) -> Tensor:
    """Round values `[..., size]` with a scale, and a zero point if not symmetric, for each row of
    `size`, as `rtn` does it with weights."""
    spec = QuantSpec(bits, None, symmetric)
    rows = values.reshape(-1, values.shape[-1])
    return _rounded(rows, spec, *spec.qparams(rows)).view_as(values)


def _rounded(values: Tensor, spec: QuantSpec, scales: Tensor, zeros: Tensor | None) -> Tensor:
    zero = spec.midpoint if zeros is None else zeros.float()
    return spec.dequantize(spec.rounded(values / scales.float() + zero), scales, zeros)


def quantize_inputs(
    layers: Mapping[str, nn.Linear], bits: int, largest: Mapping[str, float] | None = None
) -> None:
    """Quantize the inputs of linear layers from now on, symmetrically.

    Args:
        layers: by name.
        bits: 2 to 8.
        largest: each layer's largest absolute input on calibration texts, for one scale a layer,
            beyond which values are cut off; None: one scale a token, from the token itself.
    """
    spec = QuantSpec(bits, None, symmetric=True)

    def dynamic(module: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (fake_quantize(args[0], bits, symmetric=True),)

    def static(scale: Tensor) -> Any:
        return lambda module, args: (_rounded(args[0], spec, scale, None),)

    for name, layer in layers.items():
        hook = dynamic
        if largest is not None:
            scale, _ = spec.qparams(torch.tensor([[largest[name]]]))
            hook = static(scale)
        layer.register_forward_pre_hook(hook)


def quantize_cache(model: PreTrainedModel, bits: int, symmetric: bool) -> None:
    """Let each forward pass of a model go through a `QuantizedCache` of its own from now on."""

    def use_cache(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        cache = QuantizedCache(model.config, bits, symmetric)
        return args, kwargs | {"use_cache": True, "past_key_values": cache}

    model.register_forward_pre_hook(use_cache, with_kwargs=True)


def cache_bytes(config: PreTrainedConfig, bits: int | None, symmetric: bool, item: int) -> int:
    """Return the bytes of a token's keys and values in all layers.

    Quantized ones are in 32-bit words, with a 16-bit scale and a zero point of a byte for each
    head; if `bits` is None, a number has `item` bytes.
    """
    size = config.head_dim or config.hidden_size // config.num_attention_heads
    vectors = 2 * config.num_hidden_layers * config.num_key_value_heads
    one = size * item if bits is None else 4 * words(size, bits) + 2 + (not symmetric)
    return int(vectors * one)


class QuantizedCache(DynamicCache):
    """A cache whose keys (after RoPE) and values are quantized for each token and head, to 2 to
    8 bits; each has a zero point of its own if not symmetric.

    A query meets its own token's key and value quantized too, as it does where they are written
    to a paged cache first.
    """

    def __init__(self, config: PreTrainedConfig, bits: int, symmetric: bool) -> None:
        super().__init__()
        self.heads = config.num_key_value_heads
        self.bits, self.symmetric = bits, symmetric

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values `[batch, heads, tokens, head_size]`; return all of them.

        `hf_attn` keeps a stateful variant's selecting head as one head more, with a key of head 0
        and a query in place of the value. A paged cache stores no query, so that stays exact.
        """
        keys = fake_quantize(key_states, self.bits, self.symmetric)
        values = value_states.clone()
        values[:, : self.heads] = fake_quantize(values[:, : self.heads], self.bits, self.symmetric)
        found: tuple[Tensor, Tensor] = super().update(keys, values, layer_idx, *args, **kwargs)
        return found
