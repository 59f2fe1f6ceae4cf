"""Scaled cosine attention (arXiv 2111.09883): softmax of exp(min(t, ln 100)) q.k / |q||k|."""

import triton
import triton.language as tl

from attn_kernels.variants.softmax.kernel import (  # noqa: F401 (this variant's, too)
    FIRST_MAX,
    epilogue,
    merge,
    update,
)

UNIT_KEYS = True


@triton.jit
def query_factor(query, scale, head_size: tl.constexpr, params: tl.constexpr):
    factor = tl.exp(tl.minimum(query.first, 4.605170185988092))  # ln 100
    return factor / tl.maximum(query.norm, 1e-12) * 1.4426950408889634
