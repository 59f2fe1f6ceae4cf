"""Quantized values of 2 to 8 bits, packed densely into 32-bit words, lowest bits first.

A value may lie across two words, so that 3-bit values take 3 bits (compressed-tensors 0.17 puts ten
into a word; vLLM 0.32 expects them dense, as here).
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor


def words(columns: int, bits: int) -> int:
    """Return the 32-bit words of a packed row."""
    return math.ceil(columns * bits / 32)


def pack(values: Tensor, bits: int) -> Tensor:
    """Pack quantized values uint8 `[rows, columns]` into int32 `[rows, words]`; the bits that the
    last word of a row does not need are 0."""
    rows, columns = values.shape
    planes = np.unpackbits(values.numpy()[:, :, None], axis=2, bitorder="little", count=bits)
    room = np.zeros((rows, words(columns, bits) * 32), dtype=np.uint8)
    room[:, : columns * bits] = planes.reshape(rows, -1)
    return torch.from_numpy(np.packbits(room, axis=1, bitorder="little").view(np.int32))


def unpack(packed: Tensor, bits: int, columns: int) -> Tensor:
    """Return the quantized values uint8 `[rows, columns]` that `pack` packed."""
    rows = packed.shape[0]
    planes = np.unpackbits(packed.numpy().view(np.uint8), axis=1, bitorder="little")
    planes = planes[:, : columns * bits].reshape(rows, columns, bits)
    values = np.packbits(planes, axis=2, bitorder="little")[:, :, 0]
    return torch.from_numpy(np.ascontiguousarray(values))
