"""95 % confidence intervals of what is measured on a sample."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

Z = NormalDist().inv_cdf(0.975)


class Estimate(NamedTuple):
    """A figure and its 95 % confidence interval."""

    value: float
    low: float
    high: float

    def shown(self, digits: int = 3, factor: float = 1.0) -> str:
        """`1.234 [1.1, 1.3]`, multiplied by `factor`, with `digits` decimals."""
        value, low, high = (f"{factor * x:.{digits}f}" for x in self)
        return f"{value} [{low}, {high}]"

    def exp(self) -> Estimate:
        """The estimate of `exp` of the figure: a perplexity from nats."""
        return Estimate(*(math.exp(x) if x < 700 else math.inf for x in self))

    def json(self) -> list[float | None]:
        """Value, low and high to seven digits; None is infinite, which JSON does not have."""
        return [float(f"{x:.7g}") if math.isfinite(x) else None for x in self]

    @classmethod
    def from_json(cls, values: list[float | None]) -> Estimate:
        """What `json` gave."""
        ends = (math.nan, -math.inf, math.inf)
        return cls(*(end if x is None else x for x, end in zip(values, ends, strict=True)))


def t_quantile(freedom: int) -> float:
    """Student's t at 0.975 (Abramowitz and Stegun 26.7.5: 1 % too small at 3 degrees of freedom,
    and 13 % at 2; exact values stand in for 1 and 2)."""
    if freedom < 1:
        raise ValueError("an interval needs at least two values")
    if freedom <= 2:
        return (12.706, 4.303)[freedom - 1]
    z = Z
    terms = (
        z,
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
    )
    return sum(term / freedom**power for power, term in enumerate(terms))


def mean_interval(values: ArrayLike) -> Estimate:
    """Mean of independent values and its t interval; of one value the interval is infinite."""
    array = np.asarray(values, dtype=np.float64)
    mean = float(array.mean())
    if array.size < 2:
        return Estimate(mean, -math.inf, math.inf)
    half = t_quantile(array.size - 1) * float(array.std(ddof=1)) / math.sqrt(array.size)
    return Estimate(mean, mean - half, mean + half)


def share_interval(successes: int, trials: int) -> Estimate:
    """Share of successes and Wilson's interval, which is right near 0 and 1 too."""
    if trials < 1:
        raise ValueError("a share needs at least one trial")
    p = successes / trials
    centre = (p + Z**2 / (2 * trials)) / (1 + Z**2 / trials)
    half = Z / (1 + Z**2 / trials) * math.sqrt(p * (1 - p) / trials + Z**2 / (4 * trials**2))
    return Estimate(p, max(0.0, min(p, centre - half)), min(1.0, max(p, centre + half)))


def mean_share_interval(shares: Sequence[tuple[int, int]]) -> Estimate:
    """Mean of the shares of several sets, `(successes, trials)` each, and its interval.

    The sets are fixed and their trials are the sample. Each set's variance is that of
    `(successes + 1) / (trials + 2)`, so that a set without a failure has some.
    """
    smoothed = [(s + 1) / (n + 2) for s, n in shares]
    variance = sum(p * (1 - p) / n for p, (_, n) in zip(smoothed, shares, strict=True))
    mean = sum(s / n for s, n in shares) / len(shares)
    half = Z * math.sqrt(variance) / len(shares)
    return Estimate(mean, max(0.0, mean - half), min(1.0, mean + half))
