"""Softmax (arXiv 1706.03762), in powers of two. What is said: `attn_kernels.triton.variant`."""

import triton
import triton.language as tl

UNIT_KEYS = False
FIRST_MAX = float("-inf")


@triton.jit
def query_factor(query, scale, head_size: tl.constexpr, params: tl.constexpr):
    return query.n * 0.0 + scale * 1.4426950408889634


@triton.jit
def update(s, seen, running_max, denominator, mean, per_spread, query, params: tl.constexpr):
    s = tl.where(seen, s, float("-inf"))
    new_max = tl.maximum(running_max, tl.max(s, 1))
    shift = tl.where(new_max == float("-inf"), 0.0, new_max)  # no key seen yet
    weights = tl.exp2(s - shift[:, None])
    factor = tl.exp2(running_max - shift)
    return weights, factor, new_max, denominator * factor + tl.sum(weights, 1)


@triton.jit
def merge(maxima, denominators):
    running_max = tl.max(maxima, 0)
    factors = tl.exp2(maxima - tl.where(running_max == float("-inf"), 0.0, running_max))
    return factors, running_max, tl.sum(denominators * factors, 0)


@triton.jit
def epilogue(running_max, denominator, query, params: tl.constexpr):
    return tl.where(denominator == 0.0, 0.0, 1.0 / tl.where(denominator == 0.0, 1.0, denominator))


@triton.jit
def weights_backward(s, seen, dp, saved, query, params: tl.constexpr):
    weights = tl.where(seen, tl.exp2(s - saved.log_total), 0.0)
    return weights, weights * (dp - saved.delta)
