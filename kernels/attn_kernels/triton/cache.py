"""Writing new tokens' keys and values into the paged cache."""

import triton
import triton.language as tl


@triton.jit
def write_kernel(
    key, value, cache, slot_mapping,
    key_scale, value_scale,  # [1] float32, of a quantized cache
    key_stride, value_stride, block_stride, head_stride,
    SHAPE: tl.constexpr, STATEFUL: tl.constexpr, LARGEST: tl.constexpr,
):  # fmt: skip
    """Write one token and head; new accumulators start at 0. Grid: (num_tokens, num_kv_heads)."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_mapping + token)
    if slot < 0:  # padding
        return
    base = cache + slot // SHAPE.block_size * block_stride + head * head_stride
    offset = slot % SHAPE.block_size
    dim = tl.arange(0, SHAPE.dims)
    mask = dim < SHAPE.head_size
    k = tl.load(key + token * key_stride + head * SHAPE.head_size + dim, mask=mask).to(tl.float32)
    v = tl.load(value + token * value_stride + head * SHAPE.head_size + dim, mask=mask).to(
        tl.float32
    )
    if SHAPE.quantized:  # beyond the format's largest value a conversion gives NaN
        k = tl.clamp(k / tl.load(key_scale), -LARGEST, LARGEST)
        v = tl.clamp(v / tl.load(value_scale), -LARGEST, LARGEST)
    dtype: tl.constexpr = cache.dtype.element_ty
    tl.store(base + offset * SHAPE.head_size + dim, k.to(dtype), mask=mask)
    tl.store(base + (SHAPE.block_size + offset) * SHAPE.head_size + dim, v.to(dtype), mask=mask)
    if STATEFUL:
        ends = (base + 2 * SHAPE.block_size * SHAPE.head_size).to(tl.pointer_type(tl.float32))
        tl.store(ends + offset, 0.0, mask=head == 0)
