"""Two-level scales: the byte that a small group has in place of a scale and a zero point.

A row has one bfloat16 scale. A group's byte says in its low four bits which of sixteen equal parts
of that scale its own scale is, and in its high four bits which of sixteen places its zero point has
between the smallest and the largest quantized value. llama.cpp's Q2_K has the same two levels, with
a minimum where this has a zero point.
"""

from __future__ import annotations

from torch import Tensor

LEVELS = 16


def scales_of(levels: Tensor, row_scales: Tensor) -> Tensor:
    """Return the scales of groups, float32.

    Args:
        levels: uint8 `[..., groups, ...]`.
        row_scales: floating point, of a shape that broadcasts with it.
    """
    return ((levels & 15) + 1).float() / LEVELS * row_scales.float()


def zeros_of(levels: Tensor, bits: int) -> Tensor:
    """Return the zero points of groups, float32, from 0 to `2**bits - 1`."""
    return (levels >> 4).float() * ((2**bits - 1) / (LEVELS - 1))
