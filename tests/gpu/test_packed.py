"""Products and lookups with packed weights on a GPU: 2 to 8 bits, each kernel and tile, groups and
zero points, against float64 products with the dequantized matrix.

A test is one number of bits, dtype, group and number of rows, so two or three kernels to compile:
with xdist (`make gpu-check`) they are compiled side by side.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from quant_kernels import Panels, panels
from quant_kernels.pack import pack
from quant_kernels.weight import BITS, QuantizedWeight, QuantSpec, TwoLevelWeight
from tests.gpu.paged import DTYPES, ON_GPU

TOLERANCES = {"fp32": 2e-6, "bf16": 2**-8, "fp16": 2**-11}
"""Largest error of an output, relative to the sum of the absolute products. From 256 rows on
weights are rounded, too: half of it is that."""


@dataclass(frozen=True)
class Matrix:
    """A random quantized matrix without whole panels, chunks or groups.

    Attributes:
        group: columns that share a scale; None: all.
        zeros: "integers", "half" (floating point), "none" or "levels" (two-level scales).
        device: "cuda", or "cpu" for Triton's interpreter.
    """

    bits: int
    group: int | None
    zeros: str
    outputs: int
    columns: int
    device: str

    def __str__(self) -> str:
        return f"{self.device}-{self.bits}bits-{self.group}-{self.zeros}"

    def weight(self) -> QuantizedWeight:
        """Return it, always the same."""
        torch.manual_seed(self.bits)
        spec = QuantSpec(self.bits, self.group, self.zeros == "none")
        of_groups = self.outputs, spec.groups(self.columns)
        shape = self.outputs, self.columns
        values = torch.randint(0, 2**self.bits, shape, dtype=torch.uint8)
        scales = (torch.rand(of_groups) + 0.1).bfloat16()
        points: Tensor | None = None
        if self.zeros == "levels":
            levels = torch.randint(0, 256, of_groups, dtype=torch.uint8)
            return TwoLevelWeight(values, scales[:, :1], None, spec, levels=levels)
        if self.zeros == "integers":
            points = torch.randint(0, 2**self.bits, of_groups, dtype=torch.uint8)
        elif self.zeros == "half":
            points = (torch.rand(of_groups) * 2**self.bits).half()
        return QuantizedWeight(values, scales, points, spec)

    def stored(self) -> Panels:
        """Return it as the kernels take it."""
        weight = self.weight()
        zeros = weight.zeros
        if isinstance(weight, TwoLevelWeight):
            zeros = weight.levels.view(torch.int8)
        found = panels(
            pack(weight.values, self.bits),
            weight.scales,
            zeros,
            bits=self.bits,
            group_size=self.group,
            inputs=self.columns,
        )
        device = torch.device(self.device)
        zeros = None if found.zeros is None else found.zeros.to(device)
        return found._replace(
            words=found.words.to(device), scales=found.scales.to(device), zeros=zeros
        )

    def inputs(self, rows: int, dtype: str) -> Tensor:
        """Return random rows on the CPU."""
        generator = torch.Generator().manual_seed(rows)
        return torch.randn(rows, self.columns, generator=generator).to(DTYPES[dtype])


GROUPS = ((16, "levels"), (32, "levels"), (96, "half"), (128, "integers"), (None, "none"))
ROWS = (1, 3, 17, 65, 257)
"""By the kernel for few rows of float32, by each tile, and by torch's product."""

FULL = [Matrix(bits, *group, 300, 1100, "cuda") for bits, group in product(BITS, GROUPS)]
TINY = [Matrix(3, 32, "levels", 20, 70, "cpu"), Matrix(4, 32, "integers", 20, 70, "cpu")]


def check(matrix: Matrix, rows: int, dtype: str) -> None:
    """Compare a product.

    Raises:
        AssertionError: it is off by more than its tolerance.
    """
    from quant_kernels import triton

    x, exact = matrix.inputs(rows, dtype), matrix.weight().dequantize().double()
    y = triton.multiply(x.to(matrix.device), matrix.stored()).cpu().double()
    sums = x.double().abs() @ exact.abs().T
    error = float(((y - x.double() @ exact.T).abs() / sums).max())
    assert error <= TOLERANCES[dtype], f"a product is off by {error:.1e}"


def check_lookups(matrix: Matrix, dtype: str) -> None:
    """Compare lookups, which are exact.

    Raises:
        AssertionError: a row differs.
    """
    from quant_kernels import triton

    ids = torch.arange(33) * 7 % matrix.outputs
    rows = triton.gather(ids.to(matrix.device), matrix.stored(), DTYPES[dtype]).cpu()
    assert torch.equal(rows, matrix.weight().dequantize()[ids].to(DTYPES[dtype])), "lookups differ"


@pytest.mark.parametrize(
    ("matrix", "rows", "dtype"),
    [(matrix, rows, "fp16") for matrix, rows in product(TINY, ROWS)]
    + [(TINY[1], 1, "fp32")]  # the interpreter multiplies bfloat16's bit patterns
    + [
        pytest.param(matrix, rows, dtype, marks=ON_GPU)
        for rows, dtype, matrix in product(ROWS, DTYPES, FULL)
    ],
    ids=str,
)
def test_equals_the_float64_product(matrix: Matrix, rows: int, dtype: str) -> None:
    check(matrix, rows, dtype)


@pytest.mark.parametrize(
    ("matrix", "dtype"),
    [(matrix, "fp32") for matrix in TINY]
    + [pytest.param(*case, marks=ON_GPU) for case in product(FULL, DTYPES)],
    ids=str,
)
def test_lookups_are_exact(matrix: Matrix, dtype: str) -> None:
    check_lookups(matrix, dtype)


@pytest.mark.parametrize("rows", [pytest.param(rows, marks=ON_GPU) for rows in (1, 20, 300)])
def test_a_captured_product_is_replayed(rows: int) -> None:
    """With other inputs; its memory is the graph's: another product in between does no harm."""
    from quant_kernels import triton

    matrix = Matrix(4, 128, "integers", 300, 4096, "cuda")
    stored, weight = matrix.stored(), matrix.weight().dequantize().double()
    given = matrix.inputs(rows, "bf16").cuda()
    triton.multiply(given, stored)  # compiles
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = triton.multiply(given, stored)
    for factor in (1, -3):
        x = matrix.inputs(rows, "bf16") * factor
        given.copy_(x)
        triton.multiply(torch.full_like(given, torch.nan), stored)
        graph.replay()
        sums = x.double().abs() @ weight.abs().T
        error = (found.cpu().double() - x.double() @ weight.T).abs() / sums
        assert float(error.max()) <= TOLERANCES["bf16"]


@pytest.mark.parametrize(
    ("name", "message"), [("multiply", "off by [^0]"), ("gather", "lookups differ")]
)
def test_wrong_results_fail(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from quant_kernels import triton

    right: Callable[..., Any] = getattr(triton, name)
    monkeypatch.setattr(triton, name, lambda *given: right(*given) * 1.001)
    with pytest.raises(AssertionError, match=message):
        if name == "multiply":
            check(TINY[1], 5, "fp32")
        else:
            check_lookups(TINY[1], "fp32")
