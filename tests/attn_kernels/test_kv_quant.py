"""What is stored of keys and values of few bits, and what it stands for."""

import math

import pytest
import torch
from torch import Tensor

from attn_kernels import cpu, get_variant
from attn_kernels.kv_quant import KV_FORMATS, PARAMETER_BYTES, KVFormat, block_of, hadamard

INT8, INT4 = KV_FORMATS["int8_per_token_head"], KV_FORMATS["int4_per_token_head"]
FORMATS = pytest.mark.parametrize("kv_format", KV_FORMATS.values(), ids=str)


def vectors(size: int) -> Tensor:
    """Return ordinary vectors, and hard ones: 0, equal, one large element, huge and tiny."""
    torch.manual_seed(size)
    x = torch.randn(12, size)
    x[0], x[1] = 0, 3.3
    x[2, 1] = 100.0
    x[3] *= 1e30
    x[4] *= 1e-30
    x[5] += 50
    return x


@pytest.mark.parametrize("size", [16, 48, 64, 80, 256])
def test_no_element_of_8_bits_is_further_than_half_a_step(size: int) -> None:
    x = vectors(size)
    step = x.abs().amax(-1, keepdim=True) / 127
    assert ((INT8.rounded(x) - x).abs() <= step * 0.5000001 + 1e-29).all()


@pytest.mark.parametrize("size", [16, 48, 64, 80, 256])
def test_no_rotated_element_of_4_bits_is_further_than_a_step(size: int) -> None:
    """Half a step of the range, which bfloat16 parameters widen by a hundredth of its ends."""
    x = vectors(size)
    turned = hadamard(x)
    low, high = turned.amin(-1, keepdim=True), turned.amax(-1, keepdim=True)
    step = (high - low) / 15 + 0.01 * torch.maximum(low.abs(), high.abs())
    error = (hadamard(INT4.rounded(x)) - turned).abs()
    assert (error <= step * 0.51 + turned.abs().amax(-1, keepdim=True) * 1e-6 + 1e-28).all()


@FORMATS
def test_what_is_packed_comes_back(kv_format: KVFormat) -> None:
    x = vectors(48)
    stored = kv_format.pack(x)
    assert stored.shape[-1] == kv_format.vector_bytes(48) == 48 * kv_format.bits // 8 + 4
    assert kv_format.head_size(stored.shape[-1]) == 48 and PARAMETER_BYTES == 4
    assert torch.equal(kv_format.unpack(stored), kv_format.rounded(x))


@FORMATS
def test_nan_is_not_hidden(kv_format: KVFormat) -> None:
    x = vectors(32)
    x[:, 7] = math.nan
    assert kv_format.rounded(x).isnan().any(-1).all()


@pytest.mark.parametrize("size", [16, 24, 80, 64])
def test_hadamard(size: int) -> None:
    """Orthogonal but for a factor: products stay, and twice gives the vector back."""
    x, y = vectors(size).double(), torch.randn(12, size, dtype=torch.float64)
    factor = block_of(size)
    torch.testing.assert_close(hadamard(hadamard(x)) / factor, x)
    torch.testing.assert_close((hadamard(x) * hadamard(y)).sum(-1) / factor, (x * y).sum(-1))
    matrix = hadamard(torch.eye(size))
    assert (matrix.abs().sum(0) == factor).all() and matrix.abs().max() == 1


def test_few_large_elements_cost_less_when_rotated() -> None:
    """As keys of trained models have them, in 4 bits against round to nearest."""
    torch.manual_seed(0)
    x = torch.randn(500, 64)
    x[:, 3] *= 12
    low, high = x.amin(-1, keepdim=True), x.amax(-1, keepdim=True)
    step = (high - low) / 15
    plain = ((x - low) / step).round() * step + low
    assert (INT4.rounded(x) - x).square().mean() < 0.5 * (plain - x).square().mean()


def test_head_sizes_without_whole_words() -> None:
    with pytest.raises(ValueError, match="int4_per_token_head has no room for a head size of 12"):
        INT4.vector_bytes(12)


def stored_by_cpu(
    isa: str, kv_format: KVFormat, key: Tensor, value: Tensor
) -> tuple[Tensor, Tensor]:
    """Return what the C++ kernels store of `[tokens, size]` keys and values, uint8 in the order of
    `pack`: cache.hpp says how a block lies in memory."""
    (tokens, size), bits, block = key.shape, kv_format.bits, 32
    variant = get_variant("softmax")
    kernel = cpu.load(variant, isa, quantized=True)
    assert kernel is not None
    blocks = tokens // block
    kv = torch.full((blocks, 1, block, 2 * kv_format.vector_bytes(size)), 255, dtype=torch.uint8)
    layer = kernel.layer(kv, num_heads=1, scale=1.0, kv_format=kv_format)
    slots = torch.randperm(tokens)
    layer.write_cache(key[:, None], value[:, None], slots)
    width = size * bits // 8
    keys, values, parameters = kv.view(blocks, -1).split(
        [block * width, block * width, 8 * block], 1
    )
    keys = keys.view(blocks, block // 16, width, 16).transpose(2, 3).reshape(tokens, width)
    if bits == 4:  # two tokens' dims side by side, where `pack` has two dims of a token
        both = values.view(blocks, size // 16, block // 2, 16)
        values = torch.stack([both & 15, both >> 4], 3)
    values = values.reshape(blocks, size // 16, block, 16).transpose(1, 2).reshape(tokens, size)
    if bits == 4:
        values = values[:, ::2] | values[:, 1::2] << 4
    words = parameters.view(blocks, 2, block, 4).transpose(0, 1).reshape(2, tokens, 4)
    found = torch.cat([torch.stack([keys, values]), words], -1)[:, slots]
    return found[0], found[1]


@FORMATS
@pytest.mark.parametrize("isa", cpu.usable_isas())
def test_cpu_kernels_store_the_same_to_the_bit(isa: str, kv_format: KVFormat) -> None:
    for size in (32, 48, 64, 80, 112, 256):
        key = torch.cat([vectors(size), torch.randn(52, size) * 3])
        value = key.flip(0)
        for kind in (torch.float32, torch.bfloat16):
            rows = key.to(kind), value.to(kind)
            for found, row in zip(stored_by_cpu(isa, kv_format, *rows), rows, strict=True):
                assert torch.equal(found, kv_format.pack(row))
