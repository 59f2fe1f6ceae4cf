"""Keys and values of 8 or 4 bits in the cache: what is stored of a vector, and what it stands for.

Each token's key and value of each KV head is quantized when it is written, with parameters of its
own that lie in the same block: nothing is calibrated. The names, and what they mean, are vLLM's:

- `int8_per_token_head`: `scale * quantized`, quantized from -127 to 127, a float32 scale.
- `int4_per_token_head`: `offset + scale * quantized`, quantized from -8 to 7, scale and offset in
  bfloat16, of the vector times a Hadamard matrix (QuaRot, arXiv 2404.00456). That spreads a few
  large dimensions, which keys have after RoPE, over all of them. A query times the same matrix has
  the same product with the key, and the output is turned back once.

Kernels compute the same numbers, to the bit on a CPU: sums and differences in the same order,
divisions, and no product that rounds. The Hadamard matrix has entries of 1 and -1, and what is left
of it afterwards is a factor of a power of two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

PARAMETER_BYTES = 4
"""What a stored vector has besides its quantized values."""

FIELD = "kv_cache_dtype"
"""Of a checkpoint's config.json: the name of the format that its keys and values are served in."""

LEAST_SCALE = 2.0**-100
"""The scale of a vector of zeros."""


@dataclass(frozen=True)
class KVFormat:
    """How keys and values are stored.

    Args:
        bits: of a quantized value, 8 or 4.
    """

    bits: int

    def __str__(self) -> str:
        return f"int{self.bits}_per_token_head"

    @property
    def rotated(self) -> bool:
        """Whether vectors are multiplied by a Hadamard matrix first."""
        return self.bits == 4

    def vector_bytes(self, head_size: int) -> int:
        """Return the bytes of one token's key, or value, of one head.

        Raises:
            ValueError: they would not be whole words of 32 bits.
        """
        if head_size * self.bits % 32:
            raise ValueError(f"a cache of {self} has no room for a head size of {head_size}")
        return head_size * self.bits // 8 + PARAMETER_BYTES

    def head_size(self, vector_bytes: int) -> int:
        """Return the head size of vectors that take so many bytes."""
        return (vector_bytes - PARAMETER_BYTES) * 8 // self.bits

    def quantize(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return `(quantized int8 [..., size], scale [..., 1], offset [..., 1])` of vectors
        `[..., size]`, rotated if the format says so; scale and offset are float32."""
        x = x.float()
        if self.bits == 8:
            scale = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=LEAST_SCALE)
            return (x / scale).round().clamp(-127, 127).char(), scale, torch.zeros_like(scale)
        x = hadamard(x)
        low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
        offset = _bfloat16(low + 8 * ((high - low) / 15), 0x8000)
        scale = torch.maximum((high - offset) / 7, (offset - low) / 8)
        scale = _bfloat16(scale, 0xFFFF).clamp(min=LEAST_SCALE)
        return ((x - offset) / scale).round().clamp(-8, 7).char(), scale, offset

    def dequantize(self, quantized: Tensor, scale: Tensor, offset: Tensor) -> Tensor:
        """Return the vectors `[..., size]` that quantized values stand for, in the dtype of the
        scale."""
        x = quantized.to(scale.dtype) * scale + offset
        return hadamard(x) / block_of(x.shape[-1]) if self.rotated else x

    def rounded(self, x: Tensor) -> Tensor:
        """Return what attention sees of vectors `[..., size]`, float32."""
        return self.dequantize(*self.quantize(x))

    def pack(self, x: Tensor) -> Tensor:
        """Return what is stored of vectors `[..., size]`: uint8 `[..., vector_bytes]`. Quantized
        values come first, of 4 bits an even dimension's in the low half of a byte."""
        quantized, scale, offset = self.quantize(x)
        parameters = scale
        if self.bits == 4:
            quantized = quantized[..., ::2] & 15 | quantized[..., 1::2] << 4
            parameters = torch.cat([scale.bfloat16(), offset.bfloat16()], -1)
        return torch.cat([quantized.view(torch.uint8), parameters.view(torch.uint8)], -1)

    def unpack(self, stored: Tensor) -> Tensor:
        """Return the vectors that `pack` has stored, float32 `[..., size]`."""
        quantized, parameters = stored.tensor_split([-PARAMETER_BYTES], -1)
        quantized, parameters = quantized.view(torch.int8), parameters.contiguous()
        if self.bits == 8:
            scale = parameters.view(torch.float32)
            return self.dequantize(quantized, scale, torch.zeros_like(scale))
        quantized = torch.stack([quantized << 4 >> 4, quantized >> 4], -1).flatten(-2)
        scale, offset = parameters.view(torch.bfloat16).float().split(1, -1)
        return self.dequantize(quantized, scale, offset)


KV_FORMATS = {str(kind): kind for kind in (KVFormat(8), KVFormat(4))}
"""By vLLM's name of the cache's dtype."""


def block_of(size: int) -> int:
    """Return the size of the Hadamard matrix, which vectors of `size` are cut into blocks for: the
    largest power of two that divides it."""
    return size & -size


def hadamard(x: Tensor) -> Tensor:
    """Return vectors `[..., size]` times a block-diagonal Hadamard matrix of entries 1 and -1:
    twice, and divided by `block_of(size)`, it gives them back."""
    size = x.shape[-1]
    step = 1
    while step < block_of(size):
        a, b = x.unflatten(-1, (size // (2 * step), 2, step)).unbind(-2)
        x = torch.stack([a + b, a - b], -2).flatten(-3)
        step *= 2
    return x


def _bfloat16(x: Tensor, below: int) -> Tensor:
    """Return float32 numbers in bfloat16's precision: to nearest where `below` is 0x8000, away
    from 0 where it is 0xFFFF."""
    return ((x.contiguous().view(torch.int32) + below) & ~0xFFFF).view(torch.float32)
