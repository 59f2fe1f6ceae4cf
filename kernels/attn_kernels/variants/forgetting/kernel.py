"""Forgetting attention (arXiv 2503.02130): softmax of scores that decay by gates."""

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
def score_bias(query, distance, decay, params: tl.constexpr):
    return decay * 1.4426950408889634
