"""A quantized weight matrix as what is stored of it: codes, scales and zero points.

`weight = (code - zero) * scale`, with one scale and zero point for each row and group of
consecutive columns. If the group size does not divide the columns, a row's last group is shorter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant_kernels.pack import words

BITS = range(2, 9)


@dataclass(frozen=True)
class Grid:
    """The values that a weight may take.

    Args:
        bits: of a code, 2 to 8.
        group_size: columns that share a scale; None: all columns of a row (per channel).
        symmetric: the zero point is the middle code, not stored; else each group has its own.

    Raises:
        ValueError: a width or size that there is not.
    """

    bits: int
    group_size: int | None = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"{self.bits} bits: a width from {BITS[0]} to {BITS[-1]} is possible")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"a group of {self.group_size} columns is none")

    @property
    def highest(self) -> int:
        """The largest code; the smallest is 0."""
        return 2**self.bits - 1

    @property
    def middle(self) -> int:
        """The symmetric grid's zero point."""
        return 2 ** (self.bits - 1)

    def size(self, columns: int) -> int:
        """Columns of a group, in a matrix of some width."""
        return columns if self.group_size is None else min(self.group_size, columns)

    def groups(self, columns: int) -> int:
        """Groups of a row."""
        return math.ceil(columns / self.size(columns))

    def grouped(self, matrix: Tensor) -> Tensor:
        """`[rows, columns]` as `[rows, groups, size]`; a short last group is filled with zeros."""
        rows, columns = matrix.shape
        size, groups = self.size(columns), self.groups(columns)
        return pad(matrix, (0, size * groups - columns)).view(rows, groups, size)

    def spread(self, of_groups: Tensor, columns: int) -> Tensor:
        """`[rows, groups]` as `[rows, columns]`: each column has its group's value."""
        return of_groups.repeat_interleave(self.size(columns), dim=1)[:, :columns]

    def fit(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Scales and zero points that reach from each group's smallest to its largest value.

        0 is always on the grid, and no value is further than half a step from its code: the
        symmetric step is `max |w| / ((2**bits - 1) / 2)`, as in GPTQ and compressed-tensors.

        Args:
            matrix: float32 `[rows, columns]`.

        Returns:
            `(scales bfloat16, zeros uint8 or None if symmetric)`, each `[rows, groups]`.
        """
        values = self.grouped(matrix)
        low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
        if self.symmetric:
            return bfloat16_above(torch.maximum(-low, high) / (self.highest / 2)), None
        scales = bfloat16_above((high - low) / self.highest)
        return scales, (-low / scales.float()).round().clamp(0, self.highest).to(torch.uint8)

    def encode(self, matrix: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """The nearest codes, uint8, of values `[rows, columns]`; the parameters have a column for
        each column or one for all."""
        zero = self.middle if zeros is None else zeros.float()
        return self.nearest(matrix / scales.float() + zero).to(torch.uint8)

    def nearest(self, places: Tensor) -> Tensor:
        """The nearest codes of places on the grid, in the same dtype."""
        return places.round().clamp(0, self.highest)


@dataclass(frozen=True)
class QuantizedWeight:
    """A matrix on a grid: all that is stored of it.

    Args:
        codes: uint8 `[rows, columns]`, 0 to `2**bits - 1`, one code a byte (`pack` packs).
        scales: `[rows, groups]`, in the dtype that is stored.
        zeros: `[rows, groups]`: uint8 codes, or floating point where the scheme lets zero lie
            between codes; None if the grid is symmetric.
        grid: bits and groups.
    """

    codes: Tensor
    scales: Tensor
    zeros: Tensor | None
    grid: Grid

    def dequantize(self) -> Tensor:
        """Float32 `[rows, columns]`."""
        columns = self.codes.shape[1]
        zero: Tensor | int = self.grid.middle
        if self.zeros is not None:
            zero = self.grid.spread(self.zeros.float(), columns)
        return (self.codes.float() - zero) * self.grid.spread(self.scales.float(), columns)

    @property
    def packed_bytes(self) -> int:
        """Bytes when packed: codes along each row, and zero points that are codes along each
        column of groups, in 32-bit words, as compressed-tensors lays them out."""
        (rows, columns), groups = self.codes.shape, self.scales.shape[1]
        total = 4 * rows * words(columns, self.grid.bits)
        total += self.scales.numel() * self.scales.element_size()
        if self.zeros is None:
            return total
        if self.zeros.dtype == torch.uint8:
            return total + 4 * groups * words(rows, self.grid.bits)
        return total + self.zeros.numel() * self.zeros.element_size()


@dataclass(frozen=True)
class BlockWeight(QuantizedWeight):
    """A matrix as some libraries store it: scales belong to blocks of consecutive numbers of the
    flattened matrix, which may begin in one row and end in the next.

    Args:
        scales, zeros: `[blocks]`; zeros floating point, or None.
        table: float32 `[2**bits]`: what each code stands for in units of the scale, if that is not
            `code - zero`.
    """

    table: Tensor | None = None

    def dequantize(self) -> Tensor:
        """Float32 `[rows, columns]`."""
        size, count = self.grid.group_size or self.codes.shape[1], self.codes.numel()

        def spread(of_blocks: Tensor) -> Tensor:
            return of_blocks.float().repeat_interleave(size)[:count]

        if self.table is not None:
            values = self.table[self.codes.flatten().long()]
        else:
            zero = self.grid.middle if self.zeros is None else spread(self.zeros)
            values = self.codes.flatten().float() - zero
        return (values * spread(self.scales)).view(self.codes.shape)

    @property
    def packed_bytes(self) -> int:
        """Bytes with densely packed codes, whatever the library's own layout is."""
        total = 4 * words(self.codes.numel(), self.grid.bits)
        for parameters in (self.scales, self.zeros):
            if parameters is not None:
                total += parameters.numel() * parameters.element_size()
        return total


def bfloat16_above(values: Tensor) -> Tensor:
    """The smallest bfloat16 that is not below each value (at least 0); 1 for 0, which only a group
    of zeros has. Rounding a scale down would put the largest value outside the grid."""
    rounded = values.bfloat16()
    next_up = (rounded.view(torch.int16) + 1).view(torch.bfloat16)
    above = torch.where(rounded.float() < values, next_up, rounded)
    return torch.where(above == 0, torch.ones_like(above), above)
