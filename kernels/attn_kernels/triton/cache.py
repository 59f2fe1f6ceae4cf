"""The paged cache: keys and values as kernels read and write them, and the two products with them.

Where head 0 is another rank's, its keys lie behind the heads of a block, as those of one more head.
Inside its block each KV head has `block_size` keys, then as many values, then (8 and 4 bits)
their parameters (`triton/kv_quant.py`), then (stateful variants) as many float32 accumulators, of
which KV head 0's are used, or (gated variants) for each of its query heads as many sums of gates,
as `triton/gates.py` has them: rows of keys and values are aligned. SHAPE is `tiles.Shape`.
"""

from typing import Any, NamedTuple

import triton
import triton.language as tl

from attn_kernels.triton.kv_quant import load_parameters, load_quantized, store_vector


class Blocks(NamedTuple):
    """A request's blocks of the cache: pointers and strides, in elements."""

    cache: Any
    table: Any
    block_stride: Any
    head_stride: Any


@triton.jit
def load_blocks(blocks, key, inside, SHAPE: tl.constexpr):
    """Return the index in the cache of each key's block."""
    return tl.load(blocks.table + key // SHAPE.block_size, mask=inside, other=0).to(tl.int64)


@triton.jit
def load_tile_blocks(blocks, start, end, SHAPE: tl.constexpr, KEYS: tl.constexpr):
    """Return the index of the block of each of the KEYS keys from `start`, a multiple of KEYS, that
    are before `end`: one number, where all are in one block."""
    key = tl.arange(0, KEYS)
    if SHAPE.block_size % KEYS == 0:
        number, inside = start // SHAPE.block_size, start < end
    elif KEYS % SHAPE.block_size == 0:  # what does not depend on `start` stays out of a loop
        number, inside = start // SHAPE.block_size + key // SHAPE.block_size, start + key < end
    else:
        number, inside = (start + key) // SHAPE.block_size, start + key < end
    return tl.load(blocks.table + number, mask=inside, other=0).to(tl.int64)


@triton.jit
def tile_offsets(start, SHAPE: tl.constexpr, KEYS: tl.constexpr):
    """Return where the KEYS keys from `start`, a multiple of KEYS, are in their blocks."""
    offset = tl.arange(0, KEYS)
    if KEYS % SHAPE.block_size == 0:
        offset = offset % SHAPE.block_size
    elif SHAPE.block_size % KEYS == 0:
        offset += start % SHAPE.block_size
    else:
        offset = (start + offset) % SHAPE.block_size
    return offset


@triton.jit
def along(x, axis: tl.constexpr):
    """Return `[n]` as a row (axis 1) or a column (axis 0) of a matrix, and a number as it is."""
    return tl.expand_dims(x, 1 - axis) if x.type.is_block() else x


@triton.jit
def head_of(blocks, block, kv_head):
    """Return where a KV head begins in blocks."""
    return blocks.cache + block * blocks.block_stride + kv_head * blocks.head_stride


@triton.jit
def find_parameters(blocks, block, kv_head, offset, values: tl.constexpr, SHAPE: tl.constexpr):
    """Return where the parameters of keys, or of values, are in a cache of 8 or 4 bits."""
    ends = head_of(blocks, block, kv_head) + SHAPE.block_size * SHAPE.head_size * SHAPE.kv_bits // 4
    words = ends.to(tl.pointer_type(tl.int32)) + offset
    return words + SHAPE.block_size if values else words


@triton.jit
def find_state(blocks, block, kv_head, SHAPE: tl.constexpr):
    """Return where blocks hold what is behind keys, values and their parameters, float32."""
    if SHAPE.kv_bits:
        words = find_parameters(blocks, block, kv_head, 0, False, SHAPE)
        return words.to(tl.pointer_type(tl.float32)) + 2 * SHAPE.block_size
    ends = head_of(blocks, block, kv_head) + 2 * SHAPE.block_size * SHAPE.head_size
    return ends.to(tl.pointer_type(tl.float32))


@triton.jit
def load_keys(blocks, block, kv_head, offset, inside, dtype, SHAPE: tl.constexpr):
    """Return keys `[dims, keys]`, quantized if they have parameters; 0 where there are none.
    `block` is of each, or one number; `offset` is where in its block a key is."""
    dim = tl.arange(0, SHAPE.dims)[:, None]
    start = along(head_of(blocks, block, kv_head), 1)
    mask = inside[None, :]
    if SHAPE.dims > SHAPE.head_size:
        mask = mask & (dim < SHAPE.head_size)
    token = offset[None, :]
    if SHAPE.kv_bits:
        return load_quantized(start, token, dim, mask, SHAPE.head_size, SHAPE.kv_bits).to(dtype)
    return tl.load(start + (token * SHAPE.head_size + dim), mask=mask, other=0.0).to(dtype)


@triton.jit
def load_values(blocks, block, kv_head, offset, inside, dtype, SHAPE: tl.constexpr):
    """Return values `[keys, dims]`, quantized if they have parameters; 0 where there are none."""
    dim = tl.arange(0, SHAPE.dims)[None, :]
    start = along(head_of(blocks, block, kv_head), 0)
    mask = inside[:, None]
    if SHAPE.dims > SHAPE.head_size:
        mask = mask & (dim < SHAPE.head_size)
    token = (SHAPE.block_size + offset)[:, None]
    if SHAPE.kv_bits:
        return load_quantized(start, token, dim, mask, SHAPE.head_size, SHAPE.kv_bits).to(dtype)
    return tl.load(start + (token * SHAPE.head_size + dim), mask=mask, other=0.0).to(dtype)


@triton.jit
def score_keys(q, k, words, inside, zeros, SHAPE: tl.constexpr):
    """Return the products of queries `[rows, dims]` with keys `[dims, keys]`."""
    s = multiply(q, k, zeros)
    if SHAPE.kv_bits:
        scale, offset = load_parameters(words, inside, SHAPE.kv_bits)
        s *= scale[None, :]
        if SHAPE.kv_bits == 4:
            s += tl.sum(q.to(tl.float32), 1)[:, None] * offset[None, :]
    return s


@triton.jit
def add_values(weights, v, words, inside, output, SMALL: tl.constexpr, SHAPE: tl.constexpr):
    """Return `output + weights @ values`, in the values' dtype. SMALL: all weights of a row may be
    less than a float16 can be."""
    if SHAPE.kv_bits:
        scale, offset = load_parameters(words, inside, SHAPE.kv_bits)
        if SHAPE.kv_bits == 4:
            output += tl.sum(weights * offset[None, :], 1)[:, None]
        weights *= scale[None, :]
    if SMALL and v.dtype == tl.float16:
        largest = tl.max(weights, 1)[:, None]
        largest = tl.where(largest > 0.0, largest, 1.0)
        zeros = tl.zeros_like(output)
        output += largest * multiply((weights / largest).to(v.dtype), v, zeros)
    else:
        output = multiply(weights.to(v.dtype), v, output)
    return output


@triton.jit
def multiply(a, b, acc):
    """Return `acc + a @ b` in float32: no TF32, which keeps ten bits."""
    return tl.dot(a, b, acc, input_precision="ieee")


@triton.jit
def squared(k, SHAPE: tl.constexpr, ROWS: tl.constexpr):
    """Return |k|^2 of keys `[dims, keys]` in float32, beside ROWS queries.

    Of keys that are 16 bits in the cache, too, by products of 16 keys with themselves, whose
    diagonal is kept: that takes fewer instructions than to multiply each element, but registers,
    which many queries of large heads leave none of."""
    if k.dtype == tl.float32 or SHAPE.quantized or ROWS * SHAPE.dims > 128 * 128:
        k = k.to(tl.float32)
        result = tl.sum(k * k, 0)
    else:
        few = tl.reshape(tl.trans(k), (k.shape[1] // 16, 16, k.shape[0]))
        products = tl.dot(few, tl.permute(few, (0, 2, 1)))
        one, other = tl.arange(0, 16)[None, :, None], tl.arange(0, 16)[None, None, :]
        result = tl.reshape(tl.sum(tl.where(one == other, products, 0.0), 2), (k.shape[1],))
    return result


@triton.jit
def unit(k, words, inside, SHAPE: tl.constexpr, ROWS: tl.constexpr):
    """Return 1 / |k| of keys `[dims, keys]`."""
    longer: tl.constexpr = (
        (SHAPE.head_size & -SHAPE.head_size) ** 0.5 if SHAPE.kv_bits == 4 else 1.0
    )
    if SHAPE.kv_bits:
        scale, offset = load_parameters(words, inside, SHAPE.kv_bits)
        there = (tl.arange(0, SHAPE.dims) < SHAPE.head_size)[:, None]
        k = tl.where(there, k.to(tl.float32) * scale[None, :] + offset[None, :], 0.0)
    return longer * tl.rsqrt(tl.maximum(squared(k, SHAPE, ROWS), longer * longer * 1e-24))


@triton.jit
def write_kernel(
    key, value,
    selecting,  # [num_tokens, head_size]: head 0's keys, where SHAPE has a head for them
    cache, slot_mapping,
    key_scale, value_scale,  # [1] float32, of a quantized cache
    key_stride, value_stride, selecting_stride, block_stride, head_stride,
    SHAPE: tl.constexpr, STATEFUL: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Write one token and head; new accumulators start at 0. Grid: (num_tokens, num_kv_heads, and
    one more where there are selecting keys)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_mapping + token)
    if slot < 0:  # padding
        return
    base = cache + slot // SHAPE.block_size * block_stride + head * head_stride
    offset = slot % SHAPE.block_size
    dim = tl.arange(0, SHAPE.dims)
    mask = dim < SHAPE.head_size
    if SHAPE.selecting_head > 0:  # noqa: SIM102 (known when it is compiled)
        if head == SHAPE.selecting_head:
            k = tl.load(selecting + token * selecting_stride + dim, mask=mask)
            tl.store(base + offset * SHAPE.head_size + dim, k, mask=mask)
            return
    row = head * SHAPE.head_size + dim
    k = tl.load(key + token * key_stride + row, mask=mask, other=0.0).to(tl.float32)
    v = tl.load(value + token * value_stride + row, mask=mask, other=0.0).to(tl.float32)
    if SHAPE.kv_bits:
        width: tl.constexpr = SHAPE.head_size * SHAPE.kv_bits // 8
        words = (base + 2 * SHAPE.block_size * width).to(tl.pointer_type(tl.int32)) + offset
        store_vector(
            base + offset * width, words, k, mask, SHAPE.dims, SHAPE.head_size, SHAPE.kv_bits
        )
        store_vector(
            base + (SHAPE.block_size + offset) * width, words + SHAPE.block_size, v, mask,
            SHAPE.dims, SHAPE.head_size, SHAPE.kv_bits,
        )  # fmt: skip
        if STATEFUL:
            accumulators = words.to(tl.pointer_type(tl.float32)) + 2 * SHAPE.block_size
            tl.store(accumulators, 0.0, mask=head == 0)
        return
    if SHAPE.quantized:  # beyond the format's largest value a conversion gives NaN
        k = tl.clamp(k / tl.load(key_scale), -LARGEST, LARGEST)
        v = tl.clamp(v / tl.load(value_scale), -LARGEST, LARGEST)
    dtype: tl.constexpr = cache.dtype.element_ty
    tl.store(base + offset * SHAPE.head_size + dim, k.to(dtype), mask=mask)
    tl.store(base + (SHAPE.block_size + offset) * SHAPE.head_size + dim, v.to(dtype), mask=mask)
    if STATEFUL:
        ends = (base + 2 * SHAPE.block_size * SHAPE.head_size).to(tl.pointer_type(tl.float32))
        tl.store(ends + offset, 0.0, mask=head == 0)
