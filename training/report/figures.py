"""What is measured for each claim: a figure with its interval, and the range it must lie in."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from attnserve.evaluation.intervals import Estimate, mean_interval
from attnserve.reports import Range, Verdict
from quant.report import paper
from training.analyze.length import BINS
from training.report.evidence import (
    LAST_STEPS,
    Evidence,
    Missing,
    difference,
    gains,
    last_losses,
    pieces,
    windows,
)

SEED_NOISE = 0.02
"""Nats per token by which the losses of two models may differ for no reason but their seeds. An
assumption: each variant was trained once."""


def widened(difference: Estimate) -> Estimate:
    """Return a difference of two models' losses with the seeds' share in its interval."""
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
    """A condition under which a claim can be tested, for example that the control has sinks."""

    what: str
    estimate: Estimate
    range: Range


def decide(
    what: str,
    estimate: Estimate,
    range_: Range,
    condition: Condition | None = None,
    digits: int = 3,
) -> Finding:
    """Apply the rule to a figure that has a name, and a range where the claim puts it. If one of
    the conditions does not hold, the claim cannot be shown."""
    ours = f"{what}: {estimate.shown(digits)}"
    rule = str(range_)
    verdict = range_.judge(estimate)
    if condition is not None:
        ours += f"; {condition.what}: {condition.estimate.shown(digits)}"
        rule += f"; {condition.what} {condition.range}, else it cannot be shown"
        if condition.range.judge(condition.estimate) is not Verdict.AGREES:
            verdict = Verdict.UNDECIDED
    return Finding(ours, rule, verdict)


FAILS = Range(low=0.2)
"""A model fails at a length that costs it 0.2 nats per token or more: a perplexity 22 % higher."""
STAYS_LOW = Range(high=0.2)
OUTLIERS = Range(low=6.0)
"""Kurtosis of hidden states with outliers: twice that of a normal distribution."""
RETRIEVES = Range(low=0.1)
"""A key is seen if planting it brings it 0.1 nats."""


def sink_rate(evidence: Evidence, name: str, eps: float) -> Finding:
    """Judge whether softpick has no sinks, where softmax has some."""
    figure = f"sink rate at {eps}"
    control = Condition(
        "softmax's", evidence.estimate(evidence.control, "attention", figure), Range(low=0.05)
    )
    ours = evidence.estimate(name, "attention", figure)
    return decide("sink rate", ours, Range(high=0.01), control)


def kurtosis(evidence: Evidence, name: str) -> Finding:
    """Judge whether softpick's hidden states have fewer outliers, where softmax has some."""
    a, b = evidence.pair(evidence.control, name, "attention")
    logs = [np.log(stored.result.units["sequence_kurtosis"]) for stored in (a, b)]
    control = Condition("softmax's kurtosis", a.result.summary["kurtosis"], OUTLIERS)
    ratio = difference(*logs).exp()
    return decide("softmax's kurtosis over softpick's", ratio, Range(low=2.0), control, 2)


def zeros(evidence: Evidence, name: str) -> Finding:
    """Judge whether most of softpick's weights are exactly zero."""
    share = evidence.estimate(name, "attention", "zeros")
    return decide("share of exact zeros", share, Range(low=0.95))


def held_out_loss(evidence: Evidence, name: str, **ends: float) -> Finding:
    """Compare the loss on the test text at the training length with softmax's, in pairs."""
    a, b = evidence.pair(name, evidence.control, "perplexity")
    both = [stored.result.units["test"]["sequence_losses"] for stored in (a, b)]
    return decide("nats per token more than softmax", widened(difference(*both)), Range(**ends))


def lambada(evidence: Evidence, name: str) -> Finding:
    """Compare LAMBADA accuracy, passage by passage."""
    a, b = evidence.pair(name, evidence.control, "lambada")
    control = Condition("softmax's accuracy", b.result.summary["accuracy"], Range(low=0.01))
    more = difference(a.result.units["hits"], b.result.units["hits"])
    return decide("accuracy more than softmax's", more, Range(-0.02, 0.02), control)


def few_bits(evidence: Evidence, name: str, row: str) -> Finding:
    """Compare what few bits of the weights cost with what they cost softmax, on the same sequences,
    with the scheme and bits of a row of the paper's table, where softmax has outliers."""
    pair = [one for one in evidence.quantization if one.checkpoint in (name, evidence.control)]
    control = evidence.estimate(evidence.control, "attention", "kurtosis")
    (chosen,) = (one for one in paper.ROWS if one.name == row)
    ours = paper.our_advantage(pair, chosen, "test")
    if ours is None:
        raise Missing(f"no results of quant.sweep of {name} and {evidence.control} for {row}")
    what = "nats per token by which softmax's loss rises more"
    return decide(what, ours, Range(low=0.0), Condition("softmax's kurtosis", control, OUTLIERS))


def training_loss(evidence: Evidence, name: str) -> Finding:
    """Compare the training loss of the same last batches."""
    both = (name, evidence.control)
    (steps, ours), (others, control) = (last_losses(evidence, one) for one in both)
    if steps != others:
        raise Missing(f"{name} was trained for {steps} steps and {evidence.control} for {others}")
    what = f"nats per token more than softmax, last {LAST_STEPS} steps"
    return decide(what, widened(difference(ours, control)), Range(high=0.0))


def window_loss(evidence: Evidence, name: str, multiple: int, **ends: float) -> Finding:
    """Compare the loss of windows of some length with softmax's on the same windows.

    At the training length that is all tokens of the windows, in pieces. At longer ones there must
    be something to win: softmax fails.
    """
    a, b = evidence.pair(name, evidence.control, "length")
    what = f"nats per token more than softmax at {multiple}x"
    if multiple == 1:
        longest = len(b.result.units["windows"][0]) // BINS
        more = difference(pieces(a, longest), pieces(b, longest))
        return decide(what, widened(more), Range(**ends))
    more = difference(windows(a, multiple), windows(b, multiple))
    return decide(what, widened(more), Range(**ends), softmax_fails(evidence, multiple))


def stays_low(evidence: Evidence, name: str, multiple: int, factor: float = 1.0) -> Finding:
    """Judge what a long context costs, against the same tokens in pieces of the training length,
    where it costs softmax much."""
    rise = rise_of(evidence, name, multiple, factor)
    fails = softmax_fails(evidence, multiple, factor)
    return decide(f"rise of the loss at {multiple}x", rise, STAYS_LOW, fails)


def softmax_fails(evidence: Evidence, multiple: int, factor: float = 1.0) -> Condition:
    """Return the condition that the control loses something at this length."""
    return Condition("softmax's rise", rise_of(evidence, evidence.control, multiple, factor), FAILS)


def rise_of(evidence: Evidence, name: str, multiple: int, factor: float = 1.0) -> Estimate:
    """Return the loss of long windows less that of the same tokens in pieces of 1x,
    these always with the RoPE that the model was trained with."""
    long, short = evidence.get(name, "length", factor), evidence.get(name, "length")
    for part in ("context", "settings", "texts", "checkpoint"):
        if long.key[part] != short.key[part]:
            raise Missing(f"length of {name} with theta x{factor:g} and x1 differ in their {part}")
    return difference(windows(long, multiple), pieces(short, multiple))


def retrieves(evidence: Evidence, name: str, multiple: int, factor: float = 1.0) -> Finding:
    """Judge whether the model sees a key at this length and gains more of it than softmax does on
    the same prompts, if it sees one at its training length."""
    a, b = evidence.pair(name, evidence.control, "passkey", factor)
    at_home = Condition("its gain at 1x", mean_interval(gains(a, 1)), RETRIEVES)
    own = mean_interval(gains(a, multiple))
    more = difference(gains(a, multiple), gains(b, multiple))
    what = f"gain more than softmax's at {multiple}x, nats"
    finding = decide(what, more, Range(low=0.0), at_home)
    if multiple == 1:
        return finding
    ours = f"{finding.ours}; its gain at {multiple}x: {own.shown()}"
    rule = f"{finding.rule}; its gain at {multiple}x {RETRIEVES}, else it does not agree"
    verdict = finding.verdict
    if verdict is Verdict.AGREES:
        verdict = RETRIEVES.judge(own)
    return Finding(ours, rule, verdict)


def less_memory(evidence: Evidence, name: str, length: int, **ends: float) -> Finding:
    """Judge the memory of the unpruned cache over that of the smallest budgets whose validation
    loss is softmax's.

    The interval is of what softmax's loss allows, read off the path of the search.
    """
    control = evidence.control
    controls = (control, f"{control}-{length}")  # the latter was trained on at this length
    names = (name, f"{name}-{length}")
    # A result's file may have the name of another checkpoint: `selective-512` of `selective`.
    results = [one for key in names if (one := evidence.pruning.get(key))]
    own = [one for one in results if one.about["checkpoint"] in names]
    found = next((one for one in own if one.length == length), None)
    if found is None or found.about["reference"] not in controls or found.allowance is None:
        raise Missing(f"no result of attnserve budgets of {name} at {length} tokens")
    factor = Estimate(*(found.factor_within(rise) for rise in widened(found.allowance)))
    return decide("times less memory at softmax's validation loss", factor, Range(**ends), digits=1)
