"""Softmax with a learned sink a head (gpt-oss, arXiv 2508.10925): e^x / (e^sink + sum e^x)."""

import triton
import triton.language as tl

from attn_kernels.variants.softmax.kernel import (  # noqa: F401 (this variant's, too)
    FIRST_MAX,
    UNIT_KEYS,
    merge,
    query_factor,
    update,
    weights_backward,
)


@triton.jit
def normalise(running_max, denominator, sink):
    """With a sink in powers of two, wherever the largest score is."""
    shift = tl.maximum(running_max, sink)
    total = denominator * tl.exp2(running_max - shift) + tl.exp2(sink - shift)
    return tl.where(running_max == float("-inf"), 0.0, tl.exp2(running_max - shift) / total)


@triton.jit
def epilogue(running_max, denominator, query, params: tl.constexpr):
    return normalise(running_max, denominator, query.first * 1.4426950408889634)


@triton.jit
def row_backward(d_factor, factor, saved, query, scale, params: tl.constexpr):
    sink = query.first * 1.4426950408889634
    shift = tl.maximum(saved.running_max, sink)
    taken = tl.exp2(sink - shift)
    total = saved.denominator * tl.exp2(saved.running_max - shift) + taken
    return d_factor * 0.0, -saved.delta * taken / total, d_factor * 0.0
