"""The GPU kernels against the same float64 products as the CPU's, in Triton's interpreter."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from quant_kernels import Panels
from quant_kernels.weight import BITS
from tests.attn_kernels.test_triton import interpreter
from tests.quant_kernels import test_packed as packed

__all__ = ["interpreter"]

WIDTHS = [pytest.param(bits, marks=[] if bits in (3, 4) else pytest.mark.slow) for bits in BITS]
"""The default: values across words, and whole ones."""

SHAPES = (
    (1, 17, 96, 32, "integers"),
    (2, 17, 77, None, "half"),
    (9, 33, 77, None, "none"),
    (20, 75, 300, 64, "half"),
    (2, 17, 120, 16, "levels"),
    (9, 33, 120, 16, "levels"),
)
"""Rows, outputs, inputs, group, zero points: no whole panel, chunk, group or tile."""

DEFAULT = {1: (3,), 2: (4,)}
"""Widths by rows: the kernel for few rows takes seconds to interpret."""

CASES = [
    pytest.param(bits, *shape, marks=[] if fast else pytest.mark.slow)
    for bits in BITS
    for shape in SHAPES
    for fast in [bits in DEFAULT.get(shape[0], (3, 4))]
]


def multiply(x: Tensor, weight: Panels) -> Tensor:
    """Import it when it is called: the interpreter must be on."""
    from quant_kernels import triton

    return triton.multiply(x, weight)


def gather(ids: Tensor, weight: Panels, dtype: torch.dtype) -> Tensor:
    from quant_kernels import triton

    return triton.gather(ids, weight, dtype)


@pytest.fixture(autouse=True)
def on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    """`test_packed` holds these against its reference."""
    monkeypatch.setattr(packed, "multiply", multiply)
    monkeypatch.setattr(packed, "gather", gather)


@pytest.mark.parametrize(("bits", "rows", "outputs", "inputs", "group", "zeros"), CASES)
def test_products(
    bits: int, rows: int, outputs: int, inputs: int, group: int | None, zeros: str
) -> None:
    dtype = (torch.float32, torch.float16)[rows % 2]
    quantized = packed.weight(bits, outputs, inputs, group, zeros)
    packed.check(quantized, packed.poisoned(rows, inputs, dtype))


@pytest.mark.slow
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", packed.TOLERANCE, ids=str)
def test_every_tile(bits: int, dtype: torch.dtype) -> None:
    """More inputs than a program has at once, more outputs and rows than one has."""
    for rows in (1, 3, 4, 5, 16, 17, 70):
        outputs = 20 if rows < 5 else 150
        for group, zeros in ((96, "half"), (128, "integers"), (None, "none"), (16, "levels")):
            x = packed.poisoned(rows, 1100, dtype)
            packed.check(packed.weight(bits, outputs, 1100, group, zeros), x)


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("zeros", ["integers", "half", "none", "levels"])
def test_lookups_are_exact(bits: int, zeros: str) -> None:
    packed.test_lookups_are_exact(bits, zeros)
    quantized = packed.weight(bits, 20, 600, 64, zeros)
    ids = torch.tensor([19, 0, 16])
    rows = gather(ids, packed.in_panels(quantized), torch.float16)
    assert torch.equal(rows, quantized.dequantize()[ids].half())


@pytest.mark.parametrize("zeros", ["integers", "none"])
def test_rows_that_are_not_there_are_zero(zeros: str) -> None:
    """A GPU cannot raise an error, but it reads nothing that is not the matrix's: the last rows of
    the last panel are the neighbour's memory here, and rows far away nobody's."""
    quantized = packed.weight(4, 20, 96, 32, zeros)
    ids = torch.tensor([19, 20, 31, 32, 200_000, -1, 2**40, 0])
    taken = gather(ids, packed.in_panels(quantized), torch.float32)
    matrix = quantized.dequantize()
    assert torch.equal(taken[[0, -1]], matrix[[19, 0]])
    assert (taken[1:-1] == 0).all()


def test_nothing_to_do() -> None:
    """No rows, no launch."""
    stored = packed.in_panels(packed.weight(4, 17, 96, 32, "integers"))
    assert multiply(torch.empty(2, 0, 96), stored).shape == (2, 0, 17)
    ids = torch.empty(0, dtype=torch.int64)
    assert gather(ids, stored, torch.float16).shape == (0, 96)
