"""Softpick (arXiv 2504.20966): relu(e^x - 1) / (sum |e^x - 1| + eps)."""

import triton
import triton.language as tl

from attn_kernels.triton.variants.softmax import query_factor

__all__ = ["UNIT_KEYS", "finish", "merge", "query_factor", "start", "weigh"]

UNIT_KEYS = False


@triton.jit
def start(zeros):
    return zeros, zeros  # the top is never below 0: a row without a positive score is 0 anyway


@triton.jit
def weigh(s, seen, top, total, mean, per_spread, params: tl.constexpr):
    s = tl.where(seen, s, 0.0)  # e^0 - 1 adds nothing to either sum
    new_top = tl.maximum(top, tl.max(s, 1))
    p = tl.exp2(s - new_top[:, None]) - tl.exp2(-new_top)[:, None]
    factor = tl.exp2(top - new_top)
    return tl.maximum(p, 0.0), factor, new_top, total * factor + tl.sum(tl.abs(p), 1)


@triton.jit
def merge(tops, totals):
    top = tl.max(tops, 0)
    factors = tl.exp2(tops - top)
    return factors, top, tl.sum(totals * factors, 0)


@triton.jit
def finish(top, total, params: tl.constexpr):
    return 1.0 / (total + params[0])
