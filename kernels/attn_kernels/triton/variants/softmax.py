"""Softmax (arXiv 1706.03762), in powers of two. What a file here has: `__init__.py`."""

import triton
import triton.language as tl

UNIT_KEYS = False


@triton.jit
def query_factor(n, norm, first, second, scale, head_size: tl.constexpr, params: tl.constexpr):
    return tl.zeros_like(n) + scale * 1.4426950408889634


@triton.jit
def start(zeros):
    return zeros - float("inf"), zeros


@triton.jit
def weigh(s, seen, top, total, mean, per_spread, params: tl.constexpr):
    s = tl.where(seen, s, float("-inf"))
    new_top = tl.maximum(top, tl.max(s, 1))
    shift = tl.where(new_top == float("-inf"), 0.0, new_top)  # no key seen yet
    weights = tl.exp2(s - shift[:, None])
    factor = tl.exp2(top - shift)
    return weights, factor, new_top, total * factor + tl.sum(weights, 1)


@triton.jit
def merge(tops, totals):
    top = tl.max(tops, 0)
    factors = tl.exp2(tops - tl.where(top == float("-inf"), 0.0, top))
    return factors, top, tl.sum(totals * factors, 0)


@triton.jit
def finish(top, total, params: tl.constexpr):
    return tl.where(total == 0.0, 0.0, 1.0 / tl.where(total == 0.0, 1.0, total))
