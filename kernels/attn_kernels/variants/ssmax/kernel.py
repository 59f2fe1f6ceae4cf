"""Scalable softmax (arXiv 2501.19399): softmax of scores times s ln(n) + b."""

import triton
import triton.language as tl

from attn_kernels.variants.softmax.kernel import (  # noqa: F401 (this variant's, too)
    FIRST_MAX,
    UNIT_KEYS,
    epilogue,
    merge,
    update,
    weights_backward,
)


@triton.jit
def query_factor(query, scale, head_size: tl.constexpr, params: tl.constexpr):
    fixed: tl.constexpr = params[0]
    learned: tl.constexpr = fixed != fixed
    factor = tl.log(query.n) * (query.first if learned else fixed)
    if params[1] != 0.0:
        factor += query.second if learned else query.first
    return factor * scale * 1.4426950408889634


@triton.jit
def row_backward(d_factor, factor, saved, query, scale, params: tl.constexpr):
    d_bias = d_factor * scale
    d_scale = d_bias * tl.log(query.n)
    fixed: tl.constexpr = params[0]
    return d_factor * 0.0, d_scale if fixed != fixed else d_bias, d_bias
