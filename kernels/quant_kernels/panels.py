"""A packed matrix in the order of the kernels."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant_kernels.levels import scales_of, zeros_of

PANEL = 16
"""Outputs of a panel."""
CHUNK = 32
"""Inputs whose quantized values take a whole number of words, whatever their bits."""


class Panels(NamedTuple):
    """A matrix `[outputs, inputs]` as `weight = (value - zero_point) * scale`, see `packed.cpp`.

    Attributes:
        words: int32 `[panels, words of a row, 16]`: 32-bit words of densely packed values.
        scales: `[panels, groups, 16]`, float32, bfloat16 or float16; of two-level scales those of
            rows, `[panels, 1, 16]`.
        zeros: zero points `[panels, groups, 16]`, uint8 or float16; None: the midpoint
            `2**(bits - 1)`; int8: the bytes of two-level scales (`quant_kernels.levels`).
        bits: of a quantized value, 2 to 8.
        group_size: inputs that share a scale, a multiple of 32, or 16 with two-level scales.
        outputs, inputs: the shape of the matrix.
    """

    words: Tensor
    scales: Tensor
    zeros: Tensor | None
    bits: int
    group_size: int
    outputs: int
    inputs: int

    @property
    def groups(self) -> int:
        """The groups of a row."""
        return -(-self.inputs // self.group_size)


def panels(
    packed: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    *,
    bits: int,
    group_size: int | None,
    inputs: int,
) -> Panels:
    """Bring a matrix into the kernels' order; as many bytes, but for whole panels and chunks.

    Args:
        packed: int32 `[outputs, words]`, as `quant_kernels.pack.pack` packs.
        scales: `[outputs, groups]`; kept in 16 bits where these hold them exactly.
        zeros: zero points `[outputs, groups]`, uint8 or float16; None if quantization is symmetric;
            int8: the bytes of two-level scales, and `scales` are `[outputs, 1]`.
        bits: of a quantized value, 2 to 8.
        group_size: inputs that share a scale, a multiple of 32, or 16 with two-level scales; None:
            all of a row.
        inputs: columns of the matrix.
    """
    chunks = math.ceil(inputs / CHUNK)
    words = _in_panels(pad(packed, (0, chunks * bits - packed.shape[1])))
    zeros = None if zeros is None else _in_panels(zeros)
    size = group_size or chunks * CHUNK
    return Panels(words, _in_panels(_narrow(scales)), zeros, bits, size, len(packed), inputs)


def _in_panels(rows: Tensor) -> Tensor:
    """Return `[outputs, n]` as `[panels, n, 16]`; missing rows of the last panel are 0."""
    rows = pad(rows, (0, 0, 0, -len(rows) % PANEL))
    return rows.view(-1, PANEL, rows.shape[1]).transpose(1, 2).contiguous()


def _narrow(scales: Tensor) -> Tensor:
    """Return the same values in 16 bits, if there is such a format."""
    for dtype in (torch.bfloat16, torch.float16):
        if torch.equal(scales.to(dtype).to(scales.dtype), scales):
            return scales.to(dtype)
    return scales.float()


def dequantize(weight: Panels) -> Tensor:
    """Return the matrix, float32 `[outputs, inputs]`, by torch operations."""

    def rows(part: Tensor) -> Tensor:
        return part.transpose(1, 2).flatten(0, 1)[: weight.outputs]

    columns = torch.arange(weight.inputs)
    first = columns * weight.bits
    wide = pad(rows(weight.words), (0, 1)).long() & 0xFFFFFFFF
    both = wide[:, first // 32] | wide[:, first // 32 + 1] << 32
    values = (both >> first % 32 & (2**weight.bits - 1)).float()
    groups = columns // weight.group_size
    if weight.zeros is not None and weight.zeros.dtype == torch.int8:
        levels = rows(weight.zeros).view(torch.uint8)[:, groups]
        return (values - zeros_of(levels, weight.bits)) * scales_of(levels, rows(weight.scales))
    zeros: Tensor | float = float(2 ** (weight.bits - 1))
    if weight.zeros is not None:
        zeros = rows(weight.zeros).float()[:, groups]
    return (values - zeros) * rows(weight.scales).float()[:, groups]
