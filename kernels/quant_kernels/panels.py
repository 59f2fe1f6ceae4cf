"""A packed matrix in the order of the kernels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

PANEL = 16
"""Outputs of a panel."""
CHUNK = 32
"""Inputs whose codes take a whole number of words, whatever the width."""


class Panels(NamedTuple):
    """A matrix `[outputs, inputs]` as `weight = (code - zero) * scale`, see `packed.cpp`.

    Args:
        words: int32 `[panels, words of a row, 16]`: 32-bit words of densely packed codes.
        scales: `[panels, groups, 16]`, float32, bfloat16 or float16.
        zeros: the same shape, uint8 or float16; None: the middle code.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None


def panels(packed: Tensor, scales: Tensor, zeros: Tensor | None, bits: int, inputs: int) -> Panels:
    """Bring a matrix into the kernels' order; as many bytes, but for whole panels and chunks.

    Args:
        packed: int32 `[outputs, words]`, as `quant_kernels.pack.pack` packs.
        scales: `[outputs, groups]`; kept in 16 bits where these hold them exactly.
        zeros: `[outputs, groups]`, uint8 or float16; None if the grid is symmetric.
        bits: of a code, 2 to 8.
        inputs: columns of the matrix.
    """
    length = math.ceil(inputs / CHUNK) * bits
    words = _in_panels(pad(packed, (0, length - packed.shape[1])))
    return Panels(words, _in_panels(_narrow(scales)), None if zeros is None else _in_panels(zeros))


def _in_panels(rows: Tensor) -> Tensor:
    """`[outputs, n]` as `[panels, n, 16]`; missing rows of the last panel are 0."""
    rows = pad(rows, (0, 0, 0, -len(rows) % PANEL))
    return rows.view(-1, PANEL, rows.shape[1]).transpose(1, 2).contiguous()


def _narrow(scales: Tensor) -> Tensor:
    """The same values in 16 bits, if there is such a format."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scales.to(dtype).to(scales.dtype), scales):
            return scales.to(dtype)
    return scales.float()


def dequantize(weight: Panels, outputs: int, inputs: int, bits: int, group: int) -> Tensor:
    """Float32 `[outputs, inputs]`, in torch operations."""
    words, scales = (part.transpose(1, 2).flatten(0, 1)[:outputs] for part in weight[:2])
    first = torch.arange(inputs) * bits
    wide = pad(words, (0, 1)).long() & 0xFFFFFFFF
    both = wide[:, first // 32] | wide[:, first // 32 + 1] << 32
    codes = (both >> first % 32 & (2**bits - 1)).float()
    groups = torch.arange(inputs) // group
    zeros: Tensor | float = float(2 ** (bits - 1))
    if weight.zeros is not None:
        zeros = weight.zeros.transpose(1, 2).flatten(0, 1)[:outputs].float()[:, groups]
    return (codes - zeros) * scales.float()[:, groups]
