"""Writing new tokens' keys and values into the paged cache."""

import triton
import triton.language as tl


@triton.jit
def write_kernel(
    key, value, cache, slot_mapping,
    key_scale, value_scale,  # [1] float32, of a quantized cache
    key_stride, value_stride, block_stride, head_stride,
    QUANTIZED: tl.constexpr, STATEFUL: tl.constexpr, LARGEST: tl.constexpr,
    HEAD_SIZE: tl.constexpr, BLOCK_SIZE: tl.constexpr, DIMS: tl.constexpr,
):  # fmt: skip
    """Grid: (num_tokens, num_kv_heads). Slot -1 is padding; new accumulators start at 0."""
    token, head = tl.program_id(0).to(tl.int64), tl.program_id(1)
    slot = tl.load(slot_mapping + token)
    if slot < 0:
        return
    base = cache + slot // BLOCK_SIZE * block_stride + head * head_stride
    offset = slot % BLOCK_SIZE
    dim = tl.arange(0, DIMS)
    mask = dim < HEAD_SIZE
    k = tl.load(key + token * key_stride + head * HEAD_SIZE + dim, mask=mask).to(tl.float32)
    v = tl.load(value + token * value_stride + head * HEAD_SIZE + dim, mask=mask).to(tl.float32)
    if QUANTIZED:  # beyond the format's largest value a conversion gives NaN
        k = tl.clamp(k / tl.load(key_scale), -LARGEST, LARGEST)
        v = tl.clamp(v / tl.load(value_scale), -LARGEST, LARGEST)
    dtype: tl.constexpr = cache.dtype.element_ty
    tl.store(base + offset * HEAD_SIZE + dim, k.to(dtype), mask=mask)
    tl.store(base + (BLOCK_SIZE + offset) * HEAD_SIZE + dim, v.to(dtype), mask=mask)
    if STATEFUL:
        ends = (base + 2 * BLOCK_SIZE * HEAD_SIZE).to(tl.pointer_type(tl.float32))
        tl.store(ends + offset, 0.0, mask=head == 0)
