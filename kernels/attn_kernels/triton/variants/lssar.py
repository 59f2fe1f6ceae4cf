"""Re-weighted softplus attention (arXiv 2501.13428): weights proportional to relu(s - mean)^power
of LSSA's s, in units of (largest - mean)^power so that the largest term is 1."""

import triton
import triton.language as tl

from attn_kernels.triton.variants.lssa import finish, merge, query_factor, softplus, start

__all__ = [
    "UNIT_KEYS",
    "finish",
    "merge",
    "observe",
    "query_factor",
    "settle",
    "start",
    "weigh",
]

UNIT_KEYS = True


@triton.jit
def observe(s, seen, top, total):
    s = softplus(s, seen)
    return tl.maximum(top, tl.max(s, 1)), total + tl.sum(s, 1)


@triton.jit
def settle(tops, totals, n):
    top = tl.max(tops, 1)
    mean = tl.where(n <= 3.0, 0.0, tl.sum(totals, 1) / n)
    spread = top - mean
    # 0 says that all scores are equal, within rounding: then the weights are uniform.
    equal = spread <= 16 * 1.1920929e-07 * top
    return mean, tl.where(equal, 0.0, 1.0 / tl.where(equal, 1.0, spread))


@triton.jit
def weigh(s, seen, top, total, mean, per_spread, params: tl.constexpr):
    base = tl.maximum((softplus(s, seen) - mean[:, None]) * per_spread[:, None], 0.0)
    power: tl.constexpr = params[0]
    if power == 15.0:
        square = base * base
        cube = square * base
        weights = cube * cube
        weights = weights * weights * cube
    else:
        weights = tl.exp2(power * tl.log2(base))  # 0 for 0
    weights = tl.where((per_spread == 0.0)[:, None], 1.0, weights)
    weights = tl.where(seen, weights, 0.0)
    return weights, tl.zeros_like(total) + 1.0, top, total + tl.sum(weights, 1)
