"""Sigmoid attention (arXiv 2409.04431): weights sigmoid(x + bias), which are not normalised."""

import triton
import triton.language as tl

from attn_kernels.variants.softmax.kernel import query_factor  # noqa: F401 (this variant's, too)

UNIT_KEYS = False
FIRST_MAX = 0.0  # nothing is kept of a row


@triton.jit
def weigh(s, seen, n, params: tl.constexpr):
    bias: tl.constexpr = params[0]
    if bias != bias:
        s -= tl.log2(n)
    else:
        s += bias * 1.4426950408889634
    return tl.where(seen, 1.0 / (1.0 + tl.exp2(-s)), 0.0)


@triton.jit
def update(s, seen, running_max, denominator, mean, per_spread, query, params: tl.constexpr):
    weights = weigh(s, seen, query.n[:, None], params)
    return weights, denominator * 0.0 + 1.0, running_max, denominator


@triton.jit
def merge(maxima, denominators):
    return tl.zeros_like(maxima) + 1.0, tl.max(maxima, 0), tl.sum(denominators, 0)


@triton.jit
def epilogue(running_max, denominator, query, params: tl.constexpr):
    return denominator * 0.0 + 1.0


@triton.jit
def weights_backward(s, seen, dp, saved, query, params: tl.constexpr):
    weights = weigh(s, seen, query.n, params)
    return weights, weights * (1.0 - weights) * dp
