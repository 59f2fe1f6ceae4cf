"""Everything that is known of a row, in one formula (`__init__.py`)."""

import triton
import triton.language as tl

from attn_kernels.variants.sinks.kernel import normalise
from attn_kernels.variants.softmax.kernel import (  # noqa: F401 (this variant's, too)
    FIRST_MAX,
    UNIT_KEYS,
    merge,
    update,
)


@triton.jit
def query_factor(query, scale, head_size: tl.constexpr, params: tl.constexpr):
    temperature = (1.0 + tl.log(1.0 + query.position)) / (1.0 + query.norm)
    return temperature * scale * 1.4426950408889634


@triton.jit
def score_bias(query, distance, params: tl.constexpr):
    return -query.first[:, None] * 1.4426950408889634 * tl.sqrt(tl.maximum(distance, 0.0))


@triton.jit
def epilogue(running_max, denominator, query, params: tl.constexpr):
    sink = query.second * 1.4426950408889634
    return query.n / (query.n + 1.0) * normalise(running_max, denominator, sink)
