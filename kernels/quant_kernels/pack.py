"""Quantized values of 2 to 8 bits, packed densely into 32-bit words, lowest bits first.

A value may lie across two words, so that 3-bit values take 3 bits (compressed-tensors 0.17 puts ten
into a word; vLLM 0.32 expects them dense, as here).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import pad


def words(columns: int, bits: int) -> int:
    """Return the 32-bit words of a packed row."""
    return math.ceil(columns * bits / 32)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack quantized values uint8 `[rows, columns]` into int32 `[rows, words]`; the bits that the
    last word of a row does not need are 0."""
    rows, columns = values.shape
    chunks = pad(values, (0, -columns % 32)).view(rows, -1, 32)
    packed = torch.zeros(rows, chunks.shape[1], bits, dtype=torch.int64)
    for i, (word, shift) in enumerate(places(bits)):
        value = chunks[:, :, i].long()
        packed[:, :, word] |= value << shift
        if shift + bits > 32:
            packed[:, :, word + 1] |= value >> 32 - shift
    return packed.view(rows, -1)[:, : words(columns, bits)].to(torch.int32)


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the quantized values uint8 `[rows, columns]` that `pack` packed.

    Raises:
        ValueError: with one line: these are not so many.
    """
    if packed.dim() != 2 or packed.shape[1] < words(columns, bits):
        raise ValueError(
            f"words {list(packed.shape)} do not hold rows of {columns} values of {bits} bits"
        )
    rows = packed.shape[0]
    chunks = pad(packed, (0, -packed.shape[1] % bits)).view(rows, -1, bits)
    values = torch.empty(*chunks.shape[:2], 32, dtype=torch.uint8)
    for i, (word, shift) in enumerate(places(bits)):
        value = (chunks[:, :, word].long() & 0xFFFFFFFF) >> shift
        if shift + bits > 32:
            value |= chunks[:, :, word + 1].long() << 32 - shift
        values[:, :, i] = value & 2**bits - 1
    return values.view(rows, -1)[:, :columns].contiguous()


def places(bits: int) -> list[tuple[int, int]]:
    """Return of 32 values, which take `bits` words, the word and the bit where each begins."""
    return [divmod(i * bits, 32) for i in range(32)]
