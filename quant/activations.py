"""Quantized inputs of linear layers, and quantized keys and values in the cache.

Both are fake: values are rounded as if they were quantized and stay float32. Nothing here knows an
attention variant. Keys and values in a format that is served are rounded by the kernels' own
arithmetic (`attn_kernels.kv_quant`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import DynamicCache, PreTrainedConfig, PreTrainedModel

from attn_kernels.kv_quant import KV_FORMATS
from quant.config import FP8, QuantConfig
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


def quantize_cache(model: PreTrainedModel, config: QuantConfig) -> None:
    """Let each forward pass of a model go through a `QuantizedCache` of its own from now on."""

    def use_cache(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, Any]:
        cache = QuantizedCache(model.config, config)
        return args, kwargs | {"use_cache": True, "past_key_values": cache}

    model.register_forward_pre_hook(use_cache, with_kwargs=True)


def cache_rounding(config: QuantConfig) -> Callable[[Tensor], Tensor]:
    """Return what turns keys, or values, `[..., head_size]` into those that attention sees."""
    if config.kv_format in KV_FORMATS:
        return KV_FORMATS[config.kv_format].rounded
    if config.kv_format == FP8:
        return float8
    assert config.kv is not None
    bits, symmetric = config.kv, config.cache_symmetric
    return lambda x: fake_quantize(x, bits, symmetric)


def float8(x: Tensor) -> Tensor:
    """Return values in e4m3 with a scale of 1, as vLLM's `fp8` cache holds them where a checkpoint
    brings no scales; what is beyond the largest becomes that."""
    limits = torch.finfo(torch.float8_e4m3fn)
    return x.clamp(limits.min, limits.max).to(torch.float8_e4m3fn).float()


def cache_bytes(model: PreTrainedConfig, config: QuantConfig, item: int) -> int:
    """Return the bytes of a token's keys and values in all layers.

    Simulated ones are in 32-bit words, with a 16-bit scale and a zero point of a byte for each
    head; where they are not quantized, a number has `item` bytes.
    """
    size = model.head_dim or model.hidden_size // model.num_attention_heads
    vectors = 2 * model.num_hidden_layers * model.num_key_value_heads
    if config.kv_format in KV_FORMATS:
        one = KV_FORMATS[config.kv_format].vector_bytes(size)
    elif config.kv is None or config.kv_format == FP8:
        one = size * (1 if config.kv else item)
    else:
        one = 4 * words(size, config.kv) + 2 + (not config.cache_symmetric)
    return int(vectors * one)


class QuantizedCache(DynamicCache):
    """A cache whose keys (after RoPE) and values are quantized for each token and head.

    A query meets its own token's key and value quantized too, as it does where they are written
    to a paged cache first.
    """

    def __init__(self, model: PreTrainedConfig, config: QuantConfig) -> None:
        super().__init__()
        self.heads = model.num_key_value_heads
        self.rounded = cache_rounding(config)

    def update(
        self, key_states: Tensor, value_states: Tensor, layer_idx: int, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """Store keys and values `[batch, heads, tokens, head_size]`; return all of them.

        `hf_attn` keeps a stateful variant's selecting head as one head more, with a key of head 0
        and a query in place of the value. A paged cache stores no query, so that stays exact.
        """
        keys = self.rounded(key_states)
        values = value_states.clone()
        values[:, : self.heads] = self.rounded(values[:, : self.heads])
        found: tuple[Tensor, Tensor] = super().update(keys, values, layer_idx, *args, **kwargs)
        return found
