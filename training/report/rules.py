"""When a claim agrees with what was measured: one rule for all."""

from __future__ import annotations

from dataclasses import dataclass

from attnserve.evaluation.intervals import Estimate
from attnserve.reports import Range, Verdict

SEED_NOISE = 0.02
"""Nats per token by which the losses of two models may differ for no reason but their seeds. An
assumption: each variant was trained once."""


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
