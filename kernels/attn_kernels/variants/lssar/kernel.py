"""Re-weighted softplus attention (arXiv 2501.13428): weights proportional to relu(s - mean)^power
of LSSA's s, in units of (largest - mean)^power so that the largest term is 1."""

import triton
import triton.language as tl

from attn_kernels.variants.lssa.kernel import (  # noqa: F401 (this variant's, too)
    FIRST_MAX,
    UNIT_KEYS,
    merge,
    query_factor,
    row_backward,
    softplus,
    softplus_backward,
)
from attn_kernels.variants.softmax.kernel import epilogue  # noqa: F401 (this variant's, too)


@triton.jit
def update_statistics(s, seen, row_max, row_sum, query):
    s = softplus(s, seen)
    return tl.maximum(row_max, tl.max(s, 1)), row_sum + tl.sum(s, 1)


@triton.jit
def finish_statistics(maxima, sums, query):
    row_max = tl.max(maxima, 1)
    mean = tl.where(query.n <= 3.0, 0.0, tl.sum(sums, 1) / query.n)
    spread = row_max - mean
    # 0 says that all scores are equal, within rounding: then the weights are uniform.
    equal = spread <= 16 * 1.1920929e-07 * row_max
    return mean, tl.where(equal, 0.0, 1.0 / tl.where(equal, 1.0, spread))


@triton.jit
def raised(base, params: tl.constexpr):
    """Return `base` to the power."""
    power: tl.constexpr = params[0]
    if power == 15.0:
        square = base * base
        cube = square * base
        result = cube * cube
        return result * result * cube
    return tl.exp2(power * tl.log2(base))  # 0 for 0


@triton.jit
def update(s, seen, running_max, denominator, mean, per_spread, query, params: tl.constexpr):
    # Where all scores are equal the base is 1.
    shift = tl.where(per_spread == 0.0, 1.0, -mean * per_spread)
    base = tl.maximum(softplus(s, seen) * per_spread[:, None] + shift[:, None], 0.0)
    weights = tl.where(seen, raised(base, params), 0.0)
    return weights, tl.zeros_like(denominator) + 1.0, running_max, denominator + tl.sum(weights, 1)


@triton.jit
def reweighted_backward(s, seen, dp, saved, params: tl.constexpr):
    """Return the weights, and the loss's derivatives by softplus as if the mean did not depend on
    it. The largest term, by which all are divided, cancels."""
    power: tl.constexpr = params[0]
    base = (softplus(s, seen) - saved.mean) * saved.per_spread
    positive = seen & (base > 0.0)
    base = tl.where(positive, base, 1.0)
    weights = raised(base, params) * saved.factor
    slope = weights * power / base * saved.per_spread * 1.4426950408889634
    weights = tl.where(positive, weights, 0.0)
    weights = tl.where(seen & (saved.per_spread == 0.0), saved.factor, weights)
    return weights, tl.where(positive, slope * (dp - saved.delta), 0.0)


@triton.jit
def statistics_backward(s, seen, dp, saved, query, params: tl.constexpr):
    _, ds = reweighted_backward(s, seen, dp, saved, params)
    return ds


@triton.jit
def weights_backward(s, seen, dp, saved, query, params: tl.constexpr):
    weights, ds = reweighted_backward(s, seen, dp, saved, params)
    # Each softplus is a part of the mean, which is 0 for rows of at most three.
    share = tl.where(query.n <= 3.0, 0.0, saved.through / query.n)
    return weights, tl.where(seen, (ds - share) * softplus_backward(s), 0.0)
