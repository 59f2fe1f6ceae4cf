"""95 % confidence intervals of what is measured on a sample."""

import math
from collections.abc import Sequence
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import ArrayLike
from scipy import stats

Z = float(stats.norm.ppf(0.975))
"""Standard errors in half of a 95 % interval of a normal distribution."""


class Estimate(NamedTuple):
    """A figure and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def shown(self, digits: int = 3, factor: float = 1.0) -> str:
        """Return `1.234 [1.1, 1.3]`, multiplied by `factor`, with `digits` decimals."""
        value, low, high = (f"{factor * x:.{digits}f}" for x in self)
        return f"{value} [{low}, {high}]"

    def exp(self) -> Self:
        """Return the estimate of `exp` of the figure: a perplexity from nats."""
        return type(self)(*(math.exp(x) if x < 700 else math.inf for x in self))

    def within(self, low: float, high: float) -> Self:
        """Return the estimate of a figure that cannot lie outside: a share is 0 to 1."""
        return type(self)(*(min(high, max(low, x)) for x in self))

    def json(self) -> list[float | None]:
        """Return value, low and high to seven digits; None is infinite, which JSON lacks."""
        return [float(f"{x:.7g}") if math.isfinite(x) else None for x in self]

    @classmethod
    def from_json(cls, values: list[float | None]) -> Self:
        """Return the estimate that `json` gave."""
        ends = (math.nan, -math.inf, math.inf)
        return cls(*(end if x is None else x for x, end in zip(values, ends, strict=True)))


def mean_interval(values: ArrayLike) -> Estimate:
    """Return the mean of independent values and its t interval, infinite for one value."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if array.size < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = float(stats.sem(array) * stats.t.ppf(0.975, array.size - 1))
    return Estimate(mean, mean - half, mean + half)


def share_interval(successes: int, trials: int) -> Estimate:
    """Return the share of successes and Wilson's interval, which is right near 0 and 1 too."""
    test = stats.binomtest(successes, trials)
    return Estimate(test.statistic, *test.proportion_ci(method="wilson"))


def mean_share_interval(shares: Sequence[tuple[int, int]]) -> Estimate:
    """Return the mean of the shares of several sets, `(successes, trials)` each, and its interval.

    The sets are fixed and their trials are the sample. Each set's variance is that of
    `(successes + 1) / (trials + 2)`, so that a set without a failure has some.
    """
    smoothed = [(s + 1) / (n + 2) for s, n in shares]
    variance = sum(p * (1 - p) / n for p, (_, n) in zip(smoothed, shares, strict=True))
    mean = sum(s / n for s, n in shares) / len(shares)
    half = Z * math.sqrt(variance) / len(shares)
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half))
