"""When a claim agrees with what was measured: one rule for all."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import StrEnum

from attnserve.evaluation.intervals import Estimate

SEED_NOISE = 0.02
"""Nats per token by which the losses of two models may differ for no reason but their seeds. An
assumption: each variant was trained once."""


class Verdict(StrEnum):
    """What the measurements say of a claim."""

    AGREES = "agrees"
    DISAGREES = "does not agree"
    UNDECIDED = "cannot be shown at this size"
    MISSING = "not measured"


@dataclass(frozen=True)
class Range:
    """Where a figure lies if a claim is right, both ends included."""

    low: float = -math.inf
    high: float = math.inf

    def judge(self, estimate: Estimate) -> Verdict:
        """The 95 % interval inside the range agrees, outside does not, and astride decides
        nothing."""
        if estimate.low >= self.low and estimate.high <= self.high:
            return Verdict.AGREES
        if estimate.high < self.low or estimate.low > self.high:
            return Verdict.DISAGREES
        return Verdict.UNDECIDED

    def __str__(self) -> str:
        if self.low == -math.inf:
            return f"at most {self.high:g}"
        if self.high == math.inf:
            return f"at least {self.low:g}"
        return f"{self.low:g} to {self.high:g}"


def widened(difference: Estimate) -> Estimate:
    """A difference of two models' losses with the seeds' share in its interval."""
    return Estimate(difference.value, difference.low - SEED_NOISE, difference.high + SEED_NOISE)


@dataclass(frozen=True)
class Finding:
    """A claim beside what was measured."""

    ours: str
    """The figure here, or why there is none."""
    rule: str
    verdict: Verdict


@dataclass(frozen=True)
class Condition:
    """What must be so for a claim to be tested at all, for example that the control has sinks."""

    what: str
    estimate: Estimate
    range: Range


def decide(
    what: str,
    estimate: Estimate,
    range_: Range,
    conditions: tuple[Condition, ...] = (),
    digits: int = 3,
) -> Finding:
    """Apply the rule.

    Args:
        what: names the figure.
        estimate: the figure.
        range_: where the claim puts it.
        conditions: if one does not hold, the claim cannot be shown.
        digits: decimals to show.
    """
    ours = f"{what}: {estimate.shown(digits)}"
    rule = str(range_)
    verdict = range_.judge(estimate)
    for condition in conditions:
        ours += f"; {condition.what}: {condition.estimate.shown(digits)}"
        rule += f"; {condition.what} {condition.range}, else it cannot be shown"
        if condition.range.judge(condition.estimate) is not Verdict.AGREES:
            verdict = Verdict.UNDECIDED
    return Finding(ours, rule, verdict)
