"""Products and lookups with packed weights on a GPU: 2 to 8 bits, each kernel and tile, groups and
zero points, against float64 products with the dequantized matrix."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import Any

import pytest
import torch

from quant_kernels import Panels, panels
from quant_kernels.pack import pack
from quant_kernels.weight import BITS, QuantizedWeight, QuantSpec
from tests.gpu.paged import DTYPES, ON_GPU

TOLERANCES = {"fp32": 2e-6, "bf16": 2**-8, "fp16": 2**-11}
"""Largest error of an output, relative to the sum of the absolute products."""


@dataclass(frozen=True)
class MatrixShape:
    """A matrix without whole panels, chunks or groups, and the rows of `x` that it meets.

    Attributes:
        groups: columns that share a scale, and the kind of zero points.
    """

    device: str
    outputs: int
    columns: int
    rows: tuple[int, ...]
    groups: tuple[tuple[int | None, str], ...]


GROUPS = ((96, "half"), (128, "integers"), (None, "none"))
TINY = MatrixShape("cpu", 20, 70, (1, 5), ((32, "integers"),))
FULL = MatrixShape("cuda", 150, 1100, (1, 2, 3, 4, 5, 16, 17, 70), GROUPS)


def matrix(shape: MatrixShape, bits: int, group: int | None, zeros: str) -> QuantizedWeight:
    """Return a random quantized matrix."""
    spec = QuantSpec(bits, group, zeros == "none")
    of_groups = shape.outputs, spec.groups(shape.columns)
    values = torch.randint(0, 2**bits, (shape.outputs, shape.columns), dtype=torch.uint8)
    scales = (torch.rand(of_groups) + 0.1).bfloat16()
    points = None
    if zeros == "integers":
        points = torch.randint(0, 2**bits, of_groups, dtype=torch.uint8)
    elif zeros == "half":
        points = (torch.rand(of_groups) * 2**bits).half()
    return QuantizedWeight(values, scales, points, spec)


def on_device(weight: QuantizedWeight, shape: MatrixShape) -> Panels:
    """Return the matrix as the kernels take it."""
    found = panels(
        pack(weight.values, weight.spec.bits),
        weight.scales,
        weight.zeros,
        bits=weight.spec.bits,
        group_size=weight.spec.group_size,
        inputs=shape.columns,
    )
    device = torch.device(shape.device)
    zeros = None if found.zeros is None else found.zeros.to(device)
    return found._replace(words=found.words.to(device), scales=found.scales.to(device), zeros=zeros)


def check(shape: MatrixShape, bits: int, dtype: str) -> None:
    """Compare products, and lookups, which are exact.

    Raises:
        AssertionError: a product is off by more than its tolerance, or a lookup differs.
    """
    from quant_kernels import triton

    torch.manual_seed(0)
    kind = DTYPES[dtype]
    for group, zeros in shape.groups:
        weight = matrix(shape, bits, group, zeros)
        stored, exact = on_device(weight, shape), weight.dequantize()
        for rows in shape.rows:
            x = torch.randn(rows, shape.columns).to(kind)
            y = triton.multiply(x.to(shape.device), stored)
            expected = x.double() @ exact.double().T
            sums = x.double().abs() @ exact.double().abs().T
            error = float(((y.cpu().double() - expected).abs() / sums).max())
            assert error <= TOLERANCES[dtype], f"{rows} rows, group {group}, zero points {zeros}"
        ids = torch.randint(0, shape.outputs, (33,))
        given = ids.to(shape.device), stored, kind
        assert torch.equal(triton.gather(*given).cpu(), exact[ids].to(kind)), "lookups differ"


@pytest.mark.parametrize(
    ("shape", "bits", "dtype"),
    [(TINY, bits, dtype) for bits, dtype in ((3, "fp16"), (4, "fp32"))]
    + [pytest.param(FULL, bits, dtype, marks=ON_GPU) for dtype, bits in product(DTYPES, BITS)],
    ids=lambda value: value.device if isinstance(value, MatrixShape) else str(value),
)
def test_equals_the_float64_product(shape: MatrixShape, bits: int, dtype: str) -> None:
    check(shape, bits, dtype)


@pytest.mark.parametrize(
    ("name", "message"), [("multiply", "5 rows|1 rows"), ("gather", "lookups")]
)
def test_wrong_results_fail(name: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from quant_kernels import triton

    right: Callable[..., Any] = getattr(triton, name)
    monkeypatch.setattr(triton, name, lambda *given: right(*given) * 1.001)
    with pytest.raises(AssertionError, match=message):
        check(TINY, 4, "fp32")
