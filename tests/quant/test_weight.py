"""Scales, zero points, quantized values and packing: bounds that hold for any matrix, and
compressed-tensors' results."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32
from compressed_tensors.quantization import QuantizationArgs
from compressed_tensors.quantization.lifecycle.forward import dequantize, quantize
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from quant.schemes.libraries import compressed_tensors
from quant.schemes.rtn import rtn
from quant_kernels.pack import pack, unpack, words
from quant_kernels.weight import BITS, QuantSpec, bfloat16_above

specs = st.builds(
    QuantSpec, st.sampled_from(BITS), st.sampled_from([None, 1, 3, 8, 64]), symmetric=st.booleans()
)
matrices = st.tuples(st.integers(1, 5), st.integers(1, 40)).flatmap(
    lambda shape: arrays(
        np.float32, shape, elements=st.floats(-1e4, 1e4, width=32, allow_subnormal=False)
    )
)


@settings(max_examples=200, deadline=None)
@given(matrices, specs)
def test_no_value_is_further_than_half_a_step(matrix: Any, spec: QuantSpec) -> None:
    weight = torch.from_numpy(matrix)
    quantized = rtn(weight, spec)
    assert int(quantized.values.max()) <= spec.qmax
    steps = spec.expand(quantized.scales.float(), weight.shape[1])
    error = (weight - quantized.dequantize()).abs()
    assert (error <= 0.5 * steps * (1 + 1e-5) + 1e-30).all()
    # A step is no coarser than the values ask for, but for bfloat16's last bit.
    values = spec.grouped(weight)
    low, high = values.amin(-1).clamp(max=0), values.amax(-1).clamp(min=0)
    reach = 2 * torch.maximum(-low, high) if spec.symmetric else high - low
    wide = reach > 1e-30  # below, bfloat16 has fewer bits
    scales = quantized.scales.float()[wide]
    assert (scales <= (reach[wide] / spec.qmax) * (1 + 2**-7)).all()


@settings(max_examples=100, deadline=None)
@given(matrices, specs)
def test_zero_stays_zero(matrix: Any, spec: QuantSpec) -> None:
    weight = torch.from_numpy(matrix)
    weight[:, ::2] = 0
    assert (rtn(weight, spec).dequantize()[:, ::2] == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
def test_groups_of_one_sign_or_value(symmetric: bool) -> None:
    spec = QuantSpec(4, 4, symmetric)
    rows = torch.tensor([[0.0] * 4, [3.0] * 4, [-3.0] * 4, [1.0, 2.0, 3.0, 4.0]])
    found = rtn(rows, spec)
    error = (found.dequantize() - rows).abs()
    assert (error[0] == 0).all() and (error <= found.scales.float() / 2).all()
    if symmetric:
        assert found.zeros is None
    else:
        assert found.zeros is not None and found.zeros.dtype == torch.uint8
        assert found.zeros[1:].flatten().tolist() == [0, 15, 0]
        assert error[1:3].max() <= 3 * 2**-7  # an end of the spec, but for the scale's rounding


@pytest.mark.parametrize("columns", [64, 70, 688])
@pytest.mark.parametrize("size", [32, 64, 128, None])
def test_groups_of_any_width(columns: int, size: int | None) -> None:
    weight = torch.randn(6, columns, generator=torch.manual_seed(0))
    spec = QuantSpec(5, size)
    found = rtn(weight, spec)
    step = columns if size is None else size
    for group, start in enumerate(range(0, columns, step)):
        alone = rtn(weight[:, start : start + step].contiguous(), QuantSpec(5, None))
        assert torch.equal(alone.values, found.values[:, start : start + step])
        assert torch.equal(alone.scales[:, 0], found.scales[:, group])
    assert found.scales.shape[1] == spec.groups(columns) == group + 1


@given(st.lists(st.floats(0, 2.0**100, width=32), min_size=1, max_size=20))
def test_bfloat16_above(values: list[float]) -> None:
    exact = torch.tensor(values)
    above = bfloat16_above(exact)
    assert above.dtype == torch.bfloat16 and (above.float() >= exact).all()
    below = (above.view(torch.int16) - 1).view(torch.bfloat16).float()
    assert (below < exact)[exact > 0].all() and (above[exact == 0] == 1).all()


@given(st.sampled_from(BITS), st.integers(1, 4), st.integers(1, 50), st.integers(0, 2**32 - 1))
def test_packing(bits: int, rows: int, columns: int, seed: int) -> None:
    quantized = random_values(bits, rows, columns, seed)
    packed = pack(quantized, bits)
    assert packed.dtype == torch.int32 and packed.shape == (rows, words(columns, bits))
    assert words(columns, bits) == -(-columns * bits // 32)
    assert torch.equal(unpack(packed, bits, columns), quantized)


def test_packing_is_dense_from_the_lowest_bit() -> None:
    quantized = random_values(3, 1, 32, 1)
    number = sum(int(value) << (3 * place) for place, value in enumerate(quantized[0]))
    found = pack(quantized, 3).numpy().view(np.uint32)[0]
    assert sum(int(word) << (32 * place) for place, word in enumerate(found)) == number


def random_values(bits: int, rows: int, columns: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(2**bits, (rows, columns), dtype=torch.uint8, generator=generator)


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_packing_is_that_of_compressed_tensors(bits: int) -> None:
    quantized = random_values(bits, 5, 70, 0)
    signed = (quantized.int() - 2 ** (bits - 1)).to(torch.int8)
    assert torch.equal(pack(quantized, bits), pack_to_int32(signed, bits))


def test_packed_bytes() -> None:
    weight = torch.randn(64, 96)
    for bits in BITS:
        quantized, groups = 64 * 96 * bits // 8, 3
        symmetric, channel = QuantSpec(bits, 32, True), QuantSpec(bits, None, True)
        assert rtn(weight, symmetric).packed_bytes == quantized + 2 * 64 * groups
        assert rtn(weight, channel).packed_bytes == quantized + 2 * 64
        zeros = 4 * groups * words(64, bits)
        assert rtn(weight, QuantSpec(bits, 32)).packed_bytes == quantized + 2 * 64 * groups + zeros
        packed = pack(rtn(weight, symmetric).values, bits)
        assert packed.numel() * 4 == quantized


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("size", [32, None])
def test_round_to_nearest_is_that_of_compressed_tensors(
    bits: int, symmetric: bool, size: int | None
) -> None:
    weight = torch.randn(16, 96, generator=torch.manual_seed(1))
    spec = QuantSpec(bits, size, symmetric)
    ours, theirs = rtn(weight, spec), compressed_tensors(weight, spec)
    # Their scales are float32, ours the next bfloat16.
    assert torch.equal(bfloat16_above(theirs.scales), ours.scales)
    assert (ours.zeros is None) == (theirs.zeros is None)
    args = QuantizationArgs(
        num_bits=bits,
        symmetric=symmetric,
        strategy="group" if size else "channel",
        group_size=size,
    )
    zeros = (
        torch.zeros_like(ours.scales) if ours.zeros is None else ours.zeros.int() - spec.midpoint
    )
    quantized = quantize(weight, ours.scales.float(), zeros, args, dtype=torch.int8)
    assert torch.equal((quantized.int() + spec.midpoint).to(torch.uint8), ours.values)
    back = dequantize(quantized, ours.scales.float(), zeros, args)
    torch.testing.assert_close(back, ours.dequantize())
    # And with everything their own, the same error but for the scales' rounding.
    errors = [float((weight - found.dequantize()).square().mean()) for found in (ours, theirs)]
    assert errors[0] == pytest.approx(errors[1], rel=0.1)


@pytest.mark.parametrize("bits", [1, 9])
def test_widths_there_are_not(bits: int) -> None:
    with pytest.raises(ValueError, match=f"{bits} bits: 2 to 8 are possible"):
        QuantSpec(bits)
