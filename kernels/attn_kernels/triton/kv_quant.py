"""Keys and values of 8 or 4 bits in the cache: the arithmetic of `attn_kernels.kv_quant`.

A block of a KV head has its quantized keys, its quantized values, and then a 32-bit word for each
key and each value: the float32 scale of 8 bits, or the scale (low half) and offset of 4 bits in
bfloat16. Products are with what is quantized, and a token's score or weight carries the rest.
"""

import triton
import triton.language as tl

LEAST_SCALE = tl.constexpr(2.0**-100)
ROUNDER = tl.constexpr(1.5 * 2.0**23)
"""Adding it to |x| < 2^22, and taking it away, rounds x to the nearest whole number."""


@triton.jit
def hadamard(x, ROWS: tl.constexpr, DIMS: tl.constexpr, SIZE: tl.constexpr):
    """Return rows `[ROWS, DIMS]`, of SIZE dims and then 0, times the Hadamard matrix."""
    for i in tl.static_range(8):
        if SIZE % (2 << i) == 0:
            pairs = tl.reshape(x, [ROWS, DIMS // (2 << i), 2, 1 << i])
            a, b = tl.split(tl.permute(pairs, (0, 1, 3, 2)))
            pairs = tl.permute(tl.join(a + b, a - b), (0, 1, 3, 2))
            x = tl.reshape(pairs, [ROWS, DIMS])
    return x


@triton.jit
def rotate(x, ROWS: tl.constexpr, DIMS: tl.constexpr, SIZE: tl.constexpr):
    """Return queries as rotated keys need them, or outputs as they were before rotation: the
    Hadamard product by the size of the matrix."""
    block: tl.constexpr = SIZE & -SIZE
    return (hadamard(x.to(tl.float32), ROWS, DIMS, SIZE) / block).to(x.dtype)


@triton.jit
def load_quantized(base, token, dim, mask, SIZE: tl.constexpr, BITS: tl.constexpr):
    """Return quantized values, int32, of dims of tokens whose block's vectors begin at `base`."""
    byte = tl.load(base + (token * SIZE + dim) * BITS // 8, mask=mask, other=0).to(tl.int32)
    return byte << (dim % 2 == 0).to(tl.int32) * 4 + 24 >> 28 if BITS == 4 else byte


@triton.jit
def load_parameters(words, inside, BITS: tl.constexpr):
    """Return the scale and the offset of tokens, float32; 0 where there are none."""
    word = tl.load(words, mask=inside, other=0)
    if BITS == 4:
        return (word << 16).to(tl.float32, bitcast=True), (word & -65536).to(
            tl.float32, bitcast=True
        )
    scale = word.to(tl.float32, bitcast=True)
    return scale, scale * 0.0


@triton.jit
def bfloat16(x, BELOW: tl.constexpr):
    """Return the bits of float32 numbers in bfloat16's precision."""
    return (x.to(tl.int32, bitcast=True) + BELOW) & -65536


@triton.jit
def store_vector(
    vector, word, x, mask, DIMS: tl.constexpr, SIZE: tl.constexpr, BITS: tl.constexpr
):  # fmt: skip
    """Quantize a vector `[DIMS]` of float32, 0 beyond SIZE, into bytes and a word of
    parameters."""
    dim = tl.arange(0, DIMS)
    if BITS == 8:
        scale = tl.maximum(tl.div_rn(tl.max(tl.abs(x), 0), 127.0), LEAST_SCALE)
        bits = scale.to(tl.int32, bitcast=True)
        quantized = tl.clamp(tl.div_rn(x, scale) + ROUNDER - ROUNDER, -127.0, 127.0)
        tl.store(vector + dim, quantized.to(tl.int8), mask=mask)
    else:
        x = tl.reshape(hadamard(tl.reshape(x, [1, DIMS]), 1, DIMS, SIZE), [DIMS])
        low = tl.min(tl.where(mask, x, float("inf")), 0)
        high = tl.max(tl.where(mask, x, float("-inf")), 0)
        middle = bfloat16(low + 8.0 * tl.div_rn(high - low, 15.0), 0x8000)
        offset = middle.to(tl.float32, bitcast=True)
        wanted = tl.maximum(tl.div_rn(high - offset, 7.0), (offset - low) / 8.0)
        scale = tl.maximum(bfloat16(wanted, 0xFFFF).to(tl.float32, bitcast=True), LEAST_SCALE)
        bits = middle | (scale.to(tl.int32, bitcast=True) >> 16)
        quantized = tl.clamp(tl.div_rn(x - offset, scale) + ROUNDER - ROUNDER, -8.0, 7.0)
        even, odd = tl.split(tl.reshape(quantized.to(tl.int32), [DIMS // 2, 2]))
        half = tl.arange(0, DIMS // 2)
        both = (even & 15) | (odd << 4)
        tl.store(vector + half, both.to(tl.int8), mask=half < SIZE // 2)
    whole = tl.sum(tl.where(mask, x, 0.0) * 0.0, 0) == 0.0
    tl.store(word, tl.where(whole, bits, -1))  # not a number, where an element is none
