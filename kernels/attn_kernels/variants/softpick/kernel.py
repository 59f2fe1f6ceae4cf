"""Softpick (arXiv 2504.20966): relu(e^x - 1) / (sum |e^x - 1| + eps)."""

import triton
import triton.language as tl

from attn_kernels.variants.softmax.kernel import query_factor  # noqa: F401 (this variant's, too)

UNIT_KEYS = False
FIRST_MAX = 0.0  # never below 0: a row without a positive score is 0 anyway


@triton.jit
def update(s, seen, running_max, denominator, mean, per_spread, query, params: tl.constexpr):
    s = tl.where(seen, s, 0.0)  # e^0 - 1 adds nothing to either sum
    new_max = tl.maximum(running_max, tl.max(s, 1))
    p = tl.exp2(s - new_max[:, None]) - tl.exp2(-new_max)[:, None]
    factor = tl.exp2(running_max - new_max)
    return tl.maximum(p, 0.0), factor, new_max, denominator * factor + tl.sum(tl.abs(p), 1)


@triton.jit
def merge(maxima, denominators):
    running_max = tl.max(maxima, 0)
    factors = tl.exp2(maxima - running_max)
    return factors, running_max, tl.sum(denominators * factors, 0)


@triton.jit
def epilogue(running_max, denominator, query, params: tl.constexpr):
    return 1.0 / (denominator + params[0])


@triton.jit
def weights_backward(s, seen, dp, saved, query, params: tl.constexpr):
    term = tl.exp2(s - saved.log_total)
    weights = tl.where(seen & (s > 0.0), term - tl.exp2(-saved.log_total), 0.0)
    # What is below 0 takes from the others, by the denominator, and gives nothing.
    gain = tl.where(s > 0.0, dp - saved.delta, saved.delta)
    return weights, tl.where(seen & (s != 0.0), term * gain, 0.0)
