"""Softplus attention with length scaling (arXiv 2501.13428):
s = softplus(ln(d) ln(n) q.k / |q||k|), weights s / sum s."""

import triton
import triton.language as tl

from attn_kernels.triton.special import log2_1p
from attn_kernels.variants.softmax.kernel import epilogue  # noqa: F401 (this variant's, too)

UNIT_KEYS = True
FIRST_MAX = 0.0


@triton.jit
def query_factor(query, scale, head_size: tl.constexpr, params: tl.constexpr):
    log_size = tl.log(tl.zeros_like(query.n) + head_size)
    return log_size * tl.log(query.n) / tl.maximum(query.norm, 1e-12) * 1.4426950408889634


@triton.jit
def softplus(s, seen):
    """In units of ln 2, which cancel. No score is so large that its power would be infinite: they
    are bounded by ln(d) ln(n) / ln 2, which is 127 for heads of 512 and a million of keys."""
    return tl.where(seen, log2_1p(tl.exp2(s)), 0.0)


@triton.jit
def update(s, seen, running_max, denominator, mean, per_spread, query, params: tl.constexpr):
    # Scores are bounded by ln(d) ln(n): there is no running maximum.
    weights = softplus(s, seen)
    return weights, tl.zeros_like(denominator) + 1.0, running_max, denominator + tl.sum(weights, 1)


@triton.jit
def merge(maxima, denominators):
    return tl.zeros_like(maxima) + 1.0, tl.max(maxima, 0), tl.sum(denominators, 0)


@triton.jit
def softplus_backward(s):
    """Return the derivative of softplus by a score in units of 1: a sigmoid."""
    return 1.0 / (1.0 + tl.exp2(-s))


@triton.jit
def weights_backward(s, seen, dp, saved, query, params: tl.constexpr):
    weights = softplus(s, seen) * saved.factor
    # In units of ln 2 the softplus, and so the denominator, is larger by 1 / ln 2.
    slope = softplus_backward(s) * saved.factor * 1.4426950408889634
    return weights, tl.where(seen, slope * (dp - saved.delta), 0.0)


@triton.jit
def row_backward(d_factor, factor, saved, query, scale, params: tl.constexpr):
    # The factor is divided by the query's length.
    clamped = query.norm <= 1e-12
    d_norm = tl.where(clamped, 0.0, -d_factor * factor / tl.maximum(query.norm, 1e-12))
    return d_norm, d_norm, d_norm
