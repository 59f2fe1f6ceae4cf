"""Softmax plus one (Miller, Attention Is Off By One): e^x / (1 + sum e^x)."""

import triton
import triton.language as tl

from attn_kernels.variants.sinks.kernel import normalise
from attn_kernels.variants.softmax.kernel import (  # noqa: F401 (this variant's, too)
    FIRST_MAX,
    UNIT_KEYS,
    merge,
    query_factor,
    update,
    weights_backward,
)


@triton.jit
def epilogue(running_max, denominator, query, params: tl.constexpr):
    return normalise(running_max, denominator, 0.0)
