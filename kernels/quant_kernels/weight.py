"""A quantized weight matrix as what is stored of it: quantized values, scales and zero points.

`weight = (quantized - zero_point) * scale`, with one scale and zero point for each row and group of
consecutive columns. If the group size does not divide the columns, a row's last group is shorter.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from quant_kernels.levels import scales_of, zeros_of
from quant_kernels.pack import words

BITS = range(2, 9)


@dataclass(frozen=True)
class QuantSpec:
    """How a matrix is quantized.

    Args:
        bits: of a quantized value, 2 to 8.
        group_size: columns that share a scale; None: all columns of a row (per channel).
        symmetric: the zero point is the midpoint of the quantized values and is not stored; else
            each group has its own.

    Raises:
        ValueError: the bits or the group size are out of range.
    """

    bits: int
    group_size: int | None = 64
    symmetric: bool = False

    def __post_init__(self) -> None:
        if self.bits not in BITS:
            raise ValueError(f"{self.bits} bits: {BITS[0]} to {BITS[-1]} are possible")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"a group size of {self.group_size}: at least 1 is possible")

    @property
    def qmax(self) -> int:
        """The largest quantized value; the smallest is 0."""
        return 2**self.bits - 1

    @property
    def midpoint(self) -> int:
        """The zero point of symmetric quantization."""
        return 2 ** (self.bits - 1)

    def size(self, columns: int) -> int:
        """Return the columns of a group in a matrix with so many columns."""
        return columns if self.group_size is None else min(self.group_size, columns)

    def groups(self, columns: int) -> int:
        """Return the groups of a row."""
        return math.ceil(columns / self.size(columns))

    def grouped(self, matrix: Tensor) -> Tensor:
        """Return `[rows, columns]` as `[rows, groups, size]`; a short last group ends in zeros."""
        rows, columns = matrix.shape
        size, groups = self.size(columns), self.groups(columns)
        return pad(matrix, (0, size * groups - columns)).view(rows, groups, size)

    def expand(self, of_groups: Tensor, columns: int) -> Tensor:
        """Return `[rows, groups]` as `[rows, columns]`: each column has the value of its group."""
        return of_groups.repeat_interleave(self.size(columns), dim=1)[:, :columns]

    def qparams(self, matrix: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return the scales and zero points that reach from the smallest to the largest value of
        each group.

        0 is always exact, and no value is further than half a step from a quantized one: the
        symmetric step is `max |w| / ((2**bits - 1) / 2)`, as in GPTQ and compressed-tensors.

        Args:
            matrix: float32 `[rows, columns]`.

        Returns:
            Scales bfloat16 and zero points uint8 (None if symmetric), each `[rows, groups]`.
        """
        values = self.grouped(matrix)
        low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
        if self.symmetric:
            return bfloat16_above(torch.maximum(-low, high) / (self.qmax / 2)), None
        scales = bfloat16_above((high - low) / self.qmax)
        return scales, (-low / scales.float()).round().clamp(0, self.qmax).to(torch.uint8)

    def quantize(self, matrix: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Return the nearest quantized values, uint8, of `[rows, columns]`; scales and zero points
        have a column for each column or one for all."""
        zero = self.midpoint if zeros is None else zeros.float()
        return self.rounded(matrix / scales.float() + zero).to(torch.uint8)

    def dequantize(self, quantized: Tensor, scales: Tensor, zeros: Tensor | None) -> Tensor:
        """Return float32 values of quantized ones; scales and zero points are as in `quantize`."""
        zero = self.midpoint if zeros is None else zeros.float()
        return (quantized.float() - zero) * scales.float()

    def rounded(self, steps: Tensor) -> Tensor:
        """Return numbers of steps, rounded to possible quantized values, in the same dtype."""
        return steps.round().clamp(0, self.qmax)


@dataclass(frozen=True)
class QuantizedWeight:
    """A quantized matrix: all that is stored of it.

    Args:
        values: quantized values uint8 `[rows, columns]`, 0 to `2**bits - 1` (`pack` packs them).
        scales: `[rows, groups]`, in the dtype that is stored.
        zeros: zero points `[rows, groups]`: uint8 quantized values, or floating point where the
            scheme allows zero to lie between two of them; None if symmetric.
        spec: bits, group size and symmetry.
        g_idx: int32 `[columns]`, the group of each column, where GPTQ has put columns that are
            quantized one after another into a group (`desc_act`, `actorder: group`); None:
            consecutive columns are a group.
    """

    values: Tensor
    scales: Tensor
    zeros: Tensor | None
    spec: QuantSpec
    g_idx: Tensor | None = None

    def dequantize(self) -> Tensor:
        """Return the matrix float32 `[rows, columns]`."""
        zeros = None if self.zeros is None else self.expand(self.zeros)
        return self.spec.dequantize(self.values, self.expand(self.scales), zeros)

    def expand(self, of_groups: Tensor) -> Tensor:
        """Return `[rows, groups]` as `[rows, columns]`: each column has the value of its group."""
        if self.g_idx is not None:
            return of_groups[:, self.g_idx.long()]
        return self.spec.expand(of_groups, self.values.shape[1])

    @property
    def packed_bytes(self) -> int:
        """Bytes when packed: values along each row, and zero points that are quantized values along
        each column of groups, in 32-bit words, as compressed-tensors lays them out."""
        (rows, columns), groups = self.values.shape, self.scales.shape[1]
        total = 4 * rows * words(columns, self.spec.bits) + self.scales.nbytes
        if self.g_idx is not None:
            total += self.g_idx.nbytes
        if self.zeros is None:
            return total
        if self.zeros.dtype == torch.uint8:
            return total + 4 * groups * words(rows, self.spec.bits)
        return total + self.zeros.nbytes


def group_order(g_idx: Tensor, spec: QuantSpec) -> Tensor:
    """Return the columns in an order in which each group's are side by side, int64 `[columns]`.

    Args:
        g_idx: as in `QuantizedWeight`.
        spec: whose group size it must have.

    Raises:
        ValueError: a group has more or fewer columns than the group size; only the last may.
    """
    order = torch.argsort(g_idx.long(), stable=True)
    groups = torch.arange(len(g_idx)) // spec.size(len(g_idx))
    if not torch.equal(g_idx.long()[order], groups):
        raise ValueError(f"g_idx does not name groups of {spec.group_size} columns")
    return order


@dataclass(frozen=True)
class TwoLevelWeight(QuantizedWeight):
    """A quantized matrix whose scales and zero points are themselves quantized: see
    `quant_kernels.levels`.

    Args:
        scales: of rows, bfloat16 `[rows, 1]`.
        zeros: None.
        levels: of groups, uint8 `[rows, groups]`.
    """

    levels: Tensor = field(kw_only=True)

    def dequantize(self) -> Tensor:
        """Return the matrix float32 `[rows, columns]`."""
        columns = self.values.shape[1]
        levels = self.spec.expand(self.levels, columns)
        zeros = zeros_of(levels, self.spec.bits)
        return self.spec.dequantize(self.values, scales_of(levels, self.scales), zeros)

    @property
    def packed_bytes(self) -> int:
        """Bytes when packed: values along each row in 32-bit words, a byte a group, a scale a
        row."""
        rows, columns = self.values.shape
        return 4 * rows * words(columns, self.spec.bits) + self.levels.nbytes + self.scales.nbytes


@dataclass(frozen=True)
class BlockWeight(QuantizedWeight):
    """A quantized matrix as some libraries store it: scales belong to blocks of consecutive numbers
    of the flattened matrix, which may begin in one row and end in the next.

    Args:
        scales, zeros: `[blocks]`; zero points are floating point, or None.
        table: float32 `[2**bits]`: what each quantized value stands for, in units of the scale, if
            that is not `value - zero`.
    """

    table: Tensor | None = None

    def dequantize(self) -> Tensor:
        """Return the matrix float32 `[rows, columns]`."""
        size, count = self.spec.group_size or self.values.shape[1], self.values.numel()

        def expand(of_blocks: Tensor) -> Tensor:
            return of_blocks.float().repeat_interleave(size)[:count]

        if self.table is not None:
            steps = self.table[self.values.flatten().long()]
        else:
            zero = self.spec.midpoint if self.zeros is None else expand(self.zeros)
            steps = self.values.flatten().float() - zero
        return (steps * expand(self.scales)).view(self.values.shape)

    @property
    def packed_bytes(self) -> int:
        """Bytes with densely packed values, whatever the library's own layout is."""
        stored = [tensor.nbytes for tensor in (self.scales, self.zeros) if tensor is not None]
        return 4 * words(self.values.numel(), self.spec.bits) + sum(stored)


def bfloat16_above(values: Tensor) -> Tensor:
    """Return the smallest bfloat16 that is not below each value (at least 0), and 1 for 0, which
    only a group of zeros has. A scale that is rounded down would leave the largest value out of
    reach."""
    rounded = values.bfloat16()
    next_up = (rounded.view(torch.int16) + 1).view(torch.bfloat16)
    above = torch.where(rounded.float() < values, next_up, rounded)
    return torch.where(above == 0, torch.ones_like(above), above)
