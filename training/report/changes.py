"""What a conversion changed: each figure of the original and of the converted model, in pairs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Literal

import numpy as np

from attnserve.evaluation.intervals import Estimate, mean_interval
from attnserve.evaluation.perplexity import TEXTS
from quant.report.compare import choices, paired_rise
from training.analyze.length import multiples
from training.analyze.store import Stored
from training.report.evidence import Evidence, Missing, Values, difference, gains, windows

LOSSES, SINKS = "sequence_losses", "sequence_sink_rate_0.3"
Better = Literal["", "lower", "higher"]


@dataclass(frozen=True)
class Change:
    """One figure before and after, and how they differ on the same texts."""

    what: str
    values: tuple[Estimate, Estimate]  # before and after
    change: Estimate  # after less before, or after over before
    better: Better  # which of the two is better; empty: neither is in itself
    is_ratio: bool = False
    digits: int = 3

    @property
    def verdict(self) -> str:
        """Return the direction if the change's 95 % interval leaves out none at all, and whether
        that is for the better."""
        none = 1.0 if self.is_ratio else 0.0
        # Written so that no numbers, as of a model that overflows, show no difference.
        if not (self.change.low > none or self.change.high < none):
            return "no difference shown"
        direction = "higher" if self.change.value > none else "lower"
        if not self.better:
            return direction
        return f"{direction}: {'better' if direction == self.better else 'worse'}"


def unit(values: Mapping[str, object], name: str) -> Values:
    """Return the values of single texts, `[texts]`, from a result's units."""
    if name not in values:
        raise Missing(f"a result without {name}, which an older version measured")
    return np.asarray(values[name], np.float64)


def shown(pair: tuple[Stored, Stored], figure: str) -> tuple[Estimate, Estimate]:
    """Return a figure of two results."""
    before, after = (one.result.summary[figure] for one in pair)
    return before, after


def loss(text: str, evidence: Evidence, name: str) -> Change:
    """Return the change of a text's loss."""
    before, after = pair = evidence.pair(evidence.control, name, "perplexity")
    if any(text not in one.result.units for one in pair):
        raise Missing(f"no perplexity of {text}")
    change = difference(*(unit(one.result.units[text], LOSSES) for one in (after, before)))
    figures = shown(pair, f"{text} loss")
    return Change(f"loss, {text} text, nats per token", figures, change, "lower")


def lambada(evidence: Evidence, name: str) -> Change:
    """Return the change of LAMBADA's accuracy."""
    before, after = pair = evidence.pair(evidence.control, name, "lambada")
    change = difference(after.result.units["hits"], before.result.units["hits"])
    return Change("LAMBADA accuracy", shown(pair, "accuracy"), change, "higher")


def blimp(evidence: Evidence, name: str) -> Change:
    """Return the change of BLiMP's accuracy, over the pairs of all sets."""
    before, after = pair = evidence.pair(evidence.control, name, "blimp")
    each = [list(chain(*one.result.units["correct"].values())) for one in (after, before)]
    return Change("BLiMP accuracy", shown(pair, "mean"), difference(*each), "higher")


def attention(
    what: str, figure: str, each: str, is_ratio: bool, evidence: Evidence, name: str
) -> Change:
    """Return the change of a figure of the maps or hidden states, whose value on each sequence is
    in the units as `each`."""
    pair = evidence.pair(evidence.control, name, "attention")
    before, after = (unit(one.result.units, each) for one in pair)
    if is_ratio:
        change = difference(np.log(after), np.log(before)).exp()
        return Change(f"{what}, times", shown(pair, figure), change, "", is_ratio=True, digits=2)
    return Change(what, shown(pair, figure), difference(after, before), "")


def long_text(factor: float, evidence: Evidence, name: str) -> Change:
    """Return the change of the loss on the longest windows."""
    before, after = pair = evidence.pair(evidence.control, name, "length", factor)
    longest = multiples(before.key["settings"]["multiple"])[-1]
    change = difference(windows(after, longest), windows(before, longest))
    what = f"loss at {longest}x the training length{theta(factor)}, nats per token"
    return Change(what, shown(pair, f"loss of windows of {longest}x"), change, "lower")


def passkey(factor: float, evidence: Evidence, name: str) -> Change:
    """Return the change of what a planted key gains in the longest prompts."""
    before, after = pair = evidence.pair(evidence.control, name, "passkey", factor)
    longest = multiples(before.key["settings"]["multiple"])[-1]
    change = difference(gains(after, longest), gains(before, longest))
    what = f"gain of a key at {longest}x the training length{theta(factor)}, nats"
    return Change(what, shown(pair, f"gain at {longest}x"), change, "higher")


def theta(factor: float) -> str:
    """Return what is said of a factor of RoPE's theta."""
    return "" if factor == 1.0 else f", theta x{factor:g}"


def few_bits(evidence: Evidence, name: str) -> Iterator[Change]:
    """Yield by how much more few bits raise the loss, with the scheme to take for both."""
    pair = [one for one in evidence.quantization if one.checkpoint in (evidence.control, name)]
    unquantized = {one.checkpoint: one for one in pair if one.config.bits is None}
    for choice in choices(pair):
        quantized = {one.checkpoint: one for one in choice.results}
        if not {evidence.control, name} <= quantized.keys() & unquantized.keys():
            continue
        both = [(quantized[one], unquantized[one]) for one in (name, evidence.control)]
        rises = paired_rise(both)
        if rises is not None and np.isfinite(rises).all():
            after, before = (one.summary["test loss change"] for one, _ in both)
            how = "" if not choice.setting else f" ({choice.setting})"
            what = f"rise of the loss, {choice.target} in {choice.bits} bits{how}"
            yield Change(what, (before, after), mean_interval(rises), "lower")


def pruning(evidence: Evidence, name: str) -> Iterator[Change]:
    """Yield how many times less KV cache is needed at the original's loss, by length."""
    one = Estimate(1.0, 1.0, 1.0)
    for found in evidence.pruning.values():
        if found.about["checkpoint"] == name and found.allowance is not None:
            factor = Estimate(*(found.factor_within(rise) for rise in found.allowance))
            what = f"times less KV cache of {found.length} tokens at the original's loss"
            yield Change(what, (one, factor), factor, "higher", is_ratio=True, digits=1)


def changes(evidence: Evidence, name: str) -> list[Change]:
    """Return all that was measured of a converted model and of its original alike."""
    functions: list[Callable[[Evidence, str], Change]] = [
        *(partial(loss, text) for text in TEXTS),
        lambada,
        blimp,
        partial(attention, "sink rate at 0.3", "sink rate at 0.3", SINKS, False),
        partial(attention, "share of exact zeros", "zeros", "sequence_zeros", False),
        partial(attention, "kurtosis", "kurtosis", "sequence_kurtosis", True),
        partial(attention, "largest value", "largest |x|", "sequence_largest", True),
        *(partial(long_text, factor) for factor in evidence.factors("length")),
        *(partial(passkey, factor) for factor in evidence.factors("passkey")),
    ]
    found = []
    for function in functions:
        with suppress(Missing):  # the page says what was not measured
            found.append(function(evidence, name))
    return [*found, *few_bits(evidence, name), *pruning(evidence, name)]
