"""Selective attention (arXiv 2410.02703): softmax of scores less what earlier queries masked."""

import triton
import triton.language as tl

from attn_kernels.variants.softmax.kernel import (  # noqa: F401 (this variant's, too)
    FIRST_MAX,
    UNIT_KEYS,
    epilogue,
    merge,
    query_factor,
    update,
    weights_backward,
)


@triton.jit
def selection(x):
    return tl.maximum(x, 0.0)


@triton.jit
def selection_backward(x):
    return tl.where(x > 0.0, 1.0, 0.0)
