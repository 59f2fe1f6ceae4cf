"""Products and lookups with packed weights against float64 ones with the dequantized matrix."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from attn_kernels.cpu.build import usable_isas
from quant_kernels import Panels, gather, multiply, ops, panels
from quant_kernels.pack import pack
from quant_kernels.panels import dequantize
from quant_kernels.weight import BITS, QuantizedWeight, QuantSpec, TwoLevelWeight

TOLERANCE = {torch.float32: 2e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}
"""Of an output, relative to the sum of the absolute products; a 16-bit output is rounded once."""


WIDTHS = [pytest.param(bits, marks=[] if bits in (3, 4, 8) else pytest.mark.slow) for bits in BITS]
"""A library takes seconds to build: the default are values across words, whole ones, and those that
are no lookup."""


def weight(bits: int, outputs: int, inputs: int, group: int | None, zeros: str) -> QuantizedWeight:
    """Return a random one; zero points are integers, halves between them, none, or they and the
    scales are two-level ones."""
    generator = torch.Generator().manual_seed(bits)
    spec = QuantSpec(bits, group, zeros == "none")
    shape = outputs, spec.groups(inputs)
    values = torch.randint(0, 2**bits, (outputs, inputs), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(shape, generator=generator) + 0.1).bfloat16()
    if zeros == "levels":
        levels = torch.randint(0, 256, shape, generator=generator, dtype=torch.uint8)
        return TwoLevelWeight(values, scales[:, :1], None, spec, levels=levels)
    points: Tensor | None = None
    if zeros == "integers":
        points = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    elif zeros == "half":
        points = (torch.rand(shape, generator=generator) * 2**bits).half()
    return QuantizedWeight(values, scales, points, spec)


def reference(quantized: QuantizedWeight) -> Tensor:
    """Float64 `[outputs, inputs]`."""
    spec, columns = quantized.spec, quantized.values.shape[1]
    if isinstance(quantized, TwoLevelWeight):
        levels = spec.expand(quantized.levels, columns).double()
        zeros = (levels / 16).floor() / 15 * spec.qmax
        return (quantized.values - zeros) * ((levels % 16 + 1) / 16 * quantized.scales.double())
    zero: Tensor | int = spec.midpoint
    if quantized.zeros is not None:
        zero = spec.expand(quantized.zeros.double(), columns)
    return (quantized.values.double() - zero) * spec.expand(quantized.scales.double(), columns)


def in_panels(quantized: QuantizedWeight) -> Panels:
    """Return what a checkpoint holds, in the kernels' order.

    Unused bits of the last words are set: nobody may read them.
    """
    bits, columns = quantized.spec.bits, quantized.values.shape[1]
    packed = pack(quantized.values, bits)
    if used := columns * bits % 32:
        packed[:, -1] |= -1 << used
    group_size = quantized.spec.group_size
    qparams = quantized.scales, quantized.zeros
    if isinstance(quantized, TwoLevelWeight):
        qparams = quantized.scales, quantized.levels.view(torch.int8)
    return panels(packed, *qparams, bits=bits, group_size=group_size, inputs=columns)


def poisoned(rows: int, columns: int, dtype: torch.dtype) -> Tensor:
    """Random rows with NaN around each of them."""
    room = torch.full((rows + 1, columns + 7), torch.nan, dtype=dtype)
    view = room[:rows, 3 : 3 + columns]
    view.copy_(torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows)))
    return view


def check(quantized: QuantizedWeight, x: Tensor) -> None:
    """Hold a product against the reference."""
    product = multiply(x, in_panels(quantized))
    matrix = reference(quantized)
    exact, size = x.double() @ matrix.T, x.double().abs() @ matrix.abs().T
    assert product.dtype == x.dtype
    assert product.shape == exact.shape
    assert ((product.double() - exact).abs() <= TOLERANCE[x.dtype] * size + 1e-30).all()


@pytest.fixture(
    params=[
        pytest.param(isa, marks=[] if isa == "avx2" else pytest.mark.slow) for isa in usable_isas()
    ]
)
def isa(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Each instruction set of this machine."""
    monkeypatch.setenv("ATTNSERVE_CPU_ISA", request.param)
    monkeypatch.setattr(ops, "loaded", {})
    name: str = request.param
    return name


def test_a_library_is_built() -> None:
    """The others would pass by torch operations, too."""
    assert ops.load(4)


@pytest.mark.parametrize("bits", WIDTHS)
def test_products(bits: int) -> None:
    """Rows from one to several tiles; columns that are no whole chunk, group or word; outputs that
    are no whole panel."""
    for rows in (1, 2, 3, 5, 8, 9, 13, 33):
        for outputs, inputs, group, zeros in (
            (17, 96, 32, "integers"),
            (75, 300, 64, "half"),
            (33, 77, None, "none"),
            (40, 180, 16, "levels"),
            (17, 300, 96, "levels"),
        ):
            dtype = (torch.float32, torch.bfloat16, torch.float16)[(rows + outputs) % 3]
            check(weight(bits, outputs, inputs, group, zeros), poisoned(rows, inputs, dtype))


@pytest.mark.parametrize("bits", [pytest.param(3, marks=pytest.mark.slow), 4])
def test_instruction_sets(isa: str, bits: int) -> None:
    """Each of them that this machine has."""
    for rows in (1, 4, 7, 14):
        for zeros, group in (("integers", 64), ("half", 64), ("none", 64), ("levels", 16)):
            for dtype in TOLERANCE:
                check(weight(bits, 45, 330, group, zeros), poisoned(rows, 330, dtype))


def test_many_rows_and_threads() -> None:
    """More rows than a block, more inputs than a piece, by several threads."""
    matrices = weight(4, 130, 700, 128, "integers"), weight(4, 130, 700, 16, "levels")
    threads = torch.get_num_threads()
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            for rows in (1, 6, 301):
                for dtype in (torch.float32, torch.bfloat16):
                    for quantized in matrices:
                        check(quantized, poisoned(rows, 700, dtype))
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_numbers_far_apart(dtype: torch.dtype) -> None:
    """Beside a large input those of its block keep 2^-24 of it, many rows of 16 bits 2^-16,
    whatever its weight is; those of other blocks lose nothing. A row of zeros is zeros."""
    quantized = weight(4, 33, 256, 64, "integers")
    matrix = reference(quantized)
    x = (poisoned(5, 256, torch.float32).abs() + 0.5).to(dtype)
    x[:, 70] = 5e3
    x[3] = 0
    for rows, digits in (x[1:], 24), (x, 24 if dtype == torch.float32 else 16):
        product = multiply(rows, in_panels(quantized)).double()
        exact, size = rows.double() @ matrix.T, rows.double().abs() @ matrix.abs().T
        lost = 5e3 * 2**-digits * matrix[:, 64:128].abs().sum(1)
        assert ((product - exact).abs() <= TOLERANCE[dtype] * size + lost).all()
        assert not product[-2].any()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_no_number(bad: float, dtype: torch.dtype) -> None:
    """Stays in its row, and is not lost there."""
    quantized = weight(4, 20, 160, 64, "half")
    for rows in (1, 3, 7):
        x = torch.randn(rows, 160, generator=torch.Generator().manual_seed(0)).to(dtype)
        expected = multiply(x, in_panels(quantized))
        x[rows // 2, 77] = bad
        product = multiply(x, in_panels(quantized))
        assert not product[rows // 2].isfinite().any()
        others = torch.arange(rows) != rows // 2
        assert torch.equal(product[others], expected[others])


@pytest.mark.parametrize("bits", WIDTHS)
@pytest.mark.parametrize("zeros", ["integers", "half", "none", "levels"])
def test_lookups_are_exact(bits: int, zeros: str) -> None:
    quantized = weight(bits, 53, 77, 16 if zeros == "levels" else 32, zeros)
    ids = torch.tensor([[0, 52, 17], [16, 15, 0]])
    rows = gather(ids, in_panels(quantized), torch.float32)
    assert torch.equal(rows, quantized.dequantize()[ids])
    if zeros in ("integers", "none"):  # then float32 has no more to round
        assert torch.equal(rows.double(), reference(quantized)[ids])


@pytest.mark.parametrize("row", [20, 31, 32, 200_000, 2**40, -1])
@pytest.mark.parametrize("compiled", [True, False])
def test_no_lookup_reads_past_the_matrix(
    row: int, compiled: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not into the rest of the last panel either: such a row is 0, and the others are right."""
    if not compiled:
        monkeypatch.setattr(ops, "loaded", {4: False})
    stored = in_panels(weight(4, 20, 64, 32, "integers"))
    ids = torch.tensor([[3, 19], [row, 0]])
    rows = gather(ids, stored, torch.float32)
    known = gather(torch.tensor([3, 19, 0]), stored, torch.float32)
    assert torch.equal(
        rows, torch.stack((known[0], known[1], torch.zeros(64), known[2])).view(2, 2, 64)
    )


@pytest.mark.parametrize("bits", WIDTHS)
def test_without_a_compiler(bits: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Torch operations give the same."""
    quantized, small = weight(bits, 20, 77, 32, "integers"), weight(bits, 20, 77, 16, "levels")
    matrix = dequantize(in_panels(quantized))
    assert torch.equal(matrix.double(), reference(quantized))
    assert torch.equal(dequantize(in_panels(small)), small.dequantize())
    monkeypatch.setattr(ops, "loaded", {bits: False})
    check(quantized, poisoned(3, 77, torch.float32))
    check(small, poisoned(3, 77, torch.float32))


def test_compiled_graphs_hold_an_operator() -> None:
    """`torch.compile` does not look inside, and its shapes are right."""
    quantized = weight(4, 20, 64, 32, "integers")
    stored = in_panels(quantized)
    assert ops.load(4)  # which nothing can do while torch compiles

    @torch.compile(fullgraph=True, backend="eager")
    def forward(x: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        return multiply(x, stored) * 2, gather(ids, stored, x.dtype)

    x, ids = torch.randn(5, 64), torch.tensor([3, 19])
    product, rows = forward(x, ids)
    torch.testing.assert_close(product, 2 * multiply(x, stored))
    assert torch.equal(rows, gather(ids, stored, x.dtype))
    for operator, arguments in (
        (torch.ops.attnserve.packed_multiply, (x, *stored)),
        (torch.ops.attnserve.packed_gather, (ids, torch.bfloat16, *stored)),
    ):
        torch.library.opcheck(operator, arguments)


def test_memory_is_what_the_bits_say() -> None:
    """Nothing is added to whole panels and chunks; scales that 16 bits do not hold stay in 32."""
    for bits in BITS:
        quantized = weight(bits, 64, 128, 64, "integers")
        stored = in_panels(quantized)
        assert stored.words.numel() * 4 == 64 * 128 * bits // 8
        assert stored.scales.dtype == torch.bfloat16
    precise = torch.full((16, 2), 1.0000001)
    packed = pack(quantized.values[:16], bits)
    kept = panels(packed, precise, None, bits=bits, group_size=64, inputs=128)
    assert kept.scales.dtype == torch.float32
