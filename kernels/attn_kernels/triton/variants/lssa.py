"""Softplus attention with length scaling (arXiv 2501.13428):
s = softplus(ln(d) ln(n) q.k / |q||k|), weights s / sum s."""

import triton
import triton.language as tl

UNIT_KEYS = True


@triton.jit
def query_factor(n, norm, first, second, scale, head_size: tl.constexpr, params: tl.constexpr):
    log_size = tl.log(tl.zeros_like(n) + head_size)
    return log_size * tl.log(n) / tl.maximum(norm, 1e-12) * 1.4426950408889634


@triton.jit
def start(zeros):
    return zeros, zeros


@triton.jit
def softplus(s, seen):
    """In units of ln 2, which cancel."""
    return tl.where(seen, tl.maximum(s, 0.0) + tl.log2(1.0 + tl.exp2(-tl.abs(s))), 0.0)


@triton.jit
def weigh(s, seen, top, total, mean, per_spread, params: tl.constexpr):
    # Scores are bounded by ln(d) ln(n): there is no running maximum.
    weights = softplus(s, seen)
    return weights, tl.zeros_like(total) + 1.0, top, total + tl.sum(weights, 1)


@triton.jit
def merge(tops, totals):
    return tl.zeros_like(tops) + 1.0, tl.max(tops, 0), tl.sum(totals, 0)


@triton.jit
def finish(top, total, params: tl.constexpr):
    return tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
