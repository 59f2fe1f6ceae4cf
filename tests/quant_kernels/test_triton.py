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

WIDTHS = [pytest.param(bits, marks=[] if bits in (3, 4, 8) else pytest.mark.slow) for bits in BITS]
"""The default: values across words, whole ones, and those that bfloat16 has no bits for."""

ROWS = (1, 3, 17, 65, 257)
"""By the kernel for few rows of float32, by each tile, and by torch's product."""

SHAPES = (
    (17, 96, 32, "integers"),
    (75, 180, 64, "half"),
    (33, 77, None, "none"),
    (40, 200, 128, "integers"),
    (33, 40, 16, "levels"),
    (17, 90, 32, "levels"),
)
"""Outputs, inputs, group, zero points: one to three groups, no whole panel, chunk, group or
tile."""

TOLERANCE = {**packed.TOLERANCE, torch.bfloat16: 2**-7}
"""To bfloat16 the interpreter cuts off, which is twice as wrong."""


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
    monkeypatch.setattr(packed, "TOLERANCE", TOLERANCE)


@pytest.mark.parametrize(("outputs", "inputs", "group", "zeros"), SHAPES)
@pytest.mark.parametrize("bits", WIDTHS)
def test_products(bits: int, outputs: int, inputs: int, group: int | None, zeros: str) -> None:
    quantized = packed.weight(bits, outputs, inputs, group, zeros)
    for index, rows in enumerate(ROWS):
        dtype = list(TOLERANCE)[(bits + outputs + index) % 3]
        packed.check(quantized, packed.poisoned(rows, inputs, dtype))


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_every_tile(bits: int, dtype: torch.dtype) -> None:
    """Everything at every number of rows; more outputs and rows than a program has, more inputs
    than it has at once."""
    for outputs, inputs, group, zeros in (
        *SHAPES,
        (150, 1100, 96, "half"),
        (270, 330, 128, "none"),
        (270, 200, 16, "levels"),
    ):
        quantized = packed.weight(bits, outputs, inputs, group, zeros)
        for rows in (1, 2, 4, 5, 16, *ROWS[1:]):
            packed.check(quantized, packed.poisoned(rows, inputs, dtype))


@pytest.mark.parametrize(("bits", "dtype"), [(2, torch.bfloat16), (7, torch.bfloat16),
                                             (8, torch.bfloat16), (3, torch.float16)])  # fmt: skip
def test_sums_are_float32(bits: int, dtype: torch.dtype) -> None:
    """Of 16-bit inputs, too, until the output is rounded; in bfloat16 weights are more than they
    are by 128, which is taken off the sums."""
    from quant_kernels import triton

    for group, zeros in ((64, "integers"), (64, "none"), (16, "levels")):
        quantized, x = packed.weight(bits, 33, 300, group, zeros), packed.poisoned(9, 300, dtype)
        out = torch.empty(9, 33)
        triton._multiply_packed(x, packed.in_panels(quantized), out, None)
        matrix = packed.reference(quantized)
        exact, size = x.double() @ matrix.T, x.double().abs() @ matrix.abs().T
        assert ((out - exact).abs() <= 1e-5 * size).all()


@pytest.mark.parametrize("processors", [1, 2, 132])
def test_parts_of_the_inputs(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """One, some, and one for each step; the same bits at each run."""
    from quant_kernels import triton

    monkeypatch.setattr(triton, "device_figures", lambda device: ("sm_90", processors))
    for bits, dtype, rows in (
        (4, torch.float16, 5),
        (3, torch.bfloat16, 20),
        (5, torch.float32, 2),
    ):
        quantized = packed.weight(bits, 33, 2100, 128, "integers")
        x, stored = packed.poisoned(rows, 2100, dtype), packed.in_panels(quantized)
        packed.check(quantized, x)
        if rows > 2:
            assert torch.equal(multiply(x, stored), multiply(x, stored))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
def test_many_rows_of_a_large_matrix(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """The matrix is unpacked in pieces."""
    from quant_kernels import triton

    monkeypatch.setattr(triton, "UNPACKED_SIZE", 32 * 77)
    for zeros in ("half", "none"):
        packed.check(packed.weight(6, 75, 77, 32, zeros), packed.poisoned(300, 77, dtype))


@pytest.mark.parametrize("zeros", ["integers", "half", "none", "levels"])
@pytest.mark.parametrize("bits", WIDTHS)
def test_unpacked_is_exact(bits: int, zeros: str) -> None:
    from quant_kernels import triton

    group = 16 if zeros == "levels" else 32
    quantized = packed.weight(bits, 75, 330, group, zeros)
    rows = triton.unpack(packed.in_panels(quantized), torch.float32, 16, 59)
    assert torch.equal(rows, quantized.dequantize()[16:])


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_no_number(bad: float, dtype: torch.dtype) -> None:
    packed.test_no_number(bad, dtype)


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
