"""What the results say: which scheme to take at each width, and which variants differ.

Everything is paired: the same sequences, before and after, for both sides.
"""

import itertools
import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Self

import numpy as np
from numpy.typing import NDArray
from scipy import stats

from attnserve.evaluation.intervals import Estimate, mean_interval
from quant.config import UNQUANTIZED
from quant.report.frame import setting
from quant.store import SweepResult

LEVEL = 0.05
"""Share of false discoveries among the differences that are called significant."""
BOOKS = ("test", "validation")
"""Texts on which checkpoints are compared: the held-out books, or the one text that there is."""
LOSS, KL = "loss", "KL divergence"
MEASURES = (LOSS, KL)
"""By what checkpoints are compared: how much their loss rises, and how far they diverge."""


def before(results: Sequence[SweepResult]) -> dict[str, SweepResult]:
    """Return the unquantized model of each checkpoint."""
    return {result.checkpoint: result for result in results if result.config == UNQUANTIZED}


def losses(result: SweepResult, text: str = "test") -> NDArray[np.float64]:
    """Return the loss of each sequence of a text."""
    return np.array(result.units["perplexity"][text]["sequence_losses"], dtype=np.float64)


def same_text(results: Sequence[SweepResult]) -> bool:
    """Return whether results are of the same sequences, so that they can be paired."""
    keys = [(r.key["texts"], r.key["samples"], len(losses(r))) for r in results]
    return all(key == keys[0] for key in keys)


@dataclass(frozen=True)
class BestSetting:
    """The setting to take for a target at a number of bits."""

    target: str
    bits: int
    setting: str
    results: list[SweepResult]  # one for each checkpoint that was measured with it
    # The next best setting and how much more it costs: loss, mean of the checkpoints, in pairs.
    # None: there is no other, or the checkpoints were measured on different texts.
    second: str | None = None
    margin: Estimate | None = None

    @property
    def changes(self) -> dict[str, float]:
        """The change of loss of each checkpoint; what is no number is infinite."""
        values = {r.checkpoint: r.summary["test loss change"].value for r in self.results}
        return {name: math.inf if math.isnan(value) else value for name, value in values.items()}


def choices(results: Sequence[SweepResult]) -> list[BestSetting]:
    """Return what to take for each target at each number of bits, most bits first.

    It is the setting with the least KL divergence (geometric mean over checkpoints), among those
    that were measured for the most checkpoints: judged on the validation text where there is one,
    so that figures of the test text are not the best of several tries.
    """
    groups: dict[str, dict[int, dict[str, list[SweepResult]]]] = {}
    for result in results:
        if result.config != UNQUANTIZED:
            config, bits = result.config, result.config.bits
            assert bits is not None
            widths = groups.setdefault(config.target, defaultdict(lambda: defaultdict(list)))
            widths[bits][setting(config)].append(result)
    found = []
    for target in sorted(groups, key=lambda name: (name != "weights", "weights" not in name)):
        for bits in sorted(groups[target], reverse=True):
            settings = groups[target][bits]
            ranked = sorted(settings, key=lambda name: (-len(settings[name]), cost(settings[name])))
            choice = BestSetting(target, bits, ranked[0], settings[ranked[0]])
            if len(ranked) > 1 and len(settings[ranked[1]]) == len(choice.results):
                margin = None
                if same_text([*choice.results, *settings[ranked[1]]]):
                    best, other = (
                        np.mean([losses(result) for result in settings[name]], axis=0)
                        for name in ranked[:2]
                    )
                    margin = mean_interval(other - best)
                choice = replace(choice, second=ranked[1], margin=margin)
            found.append(choice)
    return found


def cost(results: Sequence[SweepResult]) -> float:
    """Return the divergence by which settings are judged."""
    judged = "validation" if all("validation KL" in r.summary for r in results) else "test"
    return mean_divergence(results, judged)


def mean_divergence(results: Sequence[SweepResult], text: str) -> float:
    """Return the geometric mean of the divergences on a text, infinite if one is no number."""
    values = np.array([result.summary[f"{text} KL"].value for result in results])
    return float(stats.gmean(values.clip(1e-12))) if np.isfinite(values).all() else math.inf


@dataclass(frozen=True)
class Difference:
    """How much more few bits cost one checkpoint than another."""

    target: str
    bits: int
    measure: str  # one of `MEASURES`
    first: str
    second: str
    rise: Estimate  # nats a token more for the first, over the sequences of all books
    chance: float  # the largest p of the books' paired t tests, corrected for all comparisons

    @property
    def significant(self) -> bool:
        """Whether such a difference is rarer by chance than is allowed, on every book."""
        return self.chance < LEVEL


def costs(
    measure: str, result: SweepResult, unquantized: SweepResult, text: str
) -> NDArray[np.float64] | None:
    """Return what few bits cost on each sequence of a text, in nats a token; None if that was not
    measured."""
    if text not in result.units["perplexity"]:
        return None
    if measure == LOSS:
        return losses(result, text) - losses(unquantized, text)
    own = result.units.get("divergence", {}).get(text)
    return None if own is None else np.array(own, dtype=np.float64)


def paired_rise(
    pairs: Sequence[tuple[SweepResult, SweepResult]], text: str = "test", measure: str = LOSS
) -> NDArray[np.float64] | None:
    """Return how much more few bits cost the first of two (after, before) pairs than the second,
    sequence by sequence; None if they were not measured on the same text."""
    if not same_text([pair[1] for pair in pairs]):
        return None
    first, second = (costs(measure, *pair, text) for pair in pairs)
    return None if first is None or second is None else first - second


def differences(
    measure: str, chosen: Sequence[BestSetting], unquantized: Mapping[str, SweepResult]
) -> list[Difference]:
    """Return the difference of each two checkpoints for each choice, with Benjamini and
    Hochberg's correction over all of them."""
    found, chances = [], []
    for choice in chosen:
        own = [result for result in choice.results if result.checkpoint in unquantized]
        for one, other in itertools.combinations(own, 2):
            pairs = [(result, unquantized[result.checkpoint]) for result in (other, one)]
            every = [paired_rise(pairs, text, measure) for text in BOOKS]
            books = [values for values in every if values is not None]
            if not books or any(len(v) < 2 or not np.isfinite(v).all() for v in books):
                continue
            rise = mean_interval(np.concatenate(books))
            names = other.checkpoint, one.checkpoint
            found.append(Difference(choice.target, choice.bits, measure, *names, rise, 1))
            chances.append(max(chance_of(values, rise.value) for values in books))
    corrected = stats.false_discovery_control(chances) if chances else []
    return [replace(each, chance=float(p)) for each, p in zip(found, corrected, strict=True)]


def chance_of(values: NDArray[np.float64], rise: float) -> float:
    """Return p of a t test of values whose mean is to have the sign of `rise`; 1 if it has not."""
    if not np.ptp(values) or values.mean() * rise <= 0:
        return 1.0
    return float(stats.ttest_1samp(values, 0).pvalue)


TEXTS = {"validation": "validation book", "wikitext2": "WikiText-2"}
"""Titles of the texts beside the main one."""


def signed(estimate: Estimate) -> str:
    """Return a change with its interval, to four decimals."""
    return f"{estimate.value:+z.4f} [{estimate.low:+z.4f}, {estimate.high:+z.4f}]"


def listed(parts: Sequence[str]) -> str:
    """Return `a, b and c`; `none` if there is nothing to list."""
    return " and ".join(filter(None, (", ".join(parts[:-1]), *parts[-1:]))) or "none"


NAMES = {"weights": "the weights", "activations": "the activations", "kv": "the key-value cache"}
"""Each tensor's name for people."""


def what(target: str) -> str:
    """Return a target's name for people."""
    return listed([NAMES[tensor] for tensor in target.split("+")])


@dataclass(frozen=True)
class Answers:
    """What a sweep's results say."""

    results: Sequence[SweepResult]
    choices: list[BestSetting]
    differences: list[Difference]

    @classmethod
    def of(cls, results: Sequence[SweepResult]) -> Self:
        """Compare results with each other."""
        chosen, unquantized = choices(results), before(results)
        found = [differences(measure, chosen, unquantized) for measure in MEASURES]
        return cls(results, chosen, list(itertools.chain(*found)))

    @property
    def targets(self) -> list[str]:
        """What was quantized."""
        return list(dict.fromkeys(choice.target for choice in self.choices))

    @property
    def baseline(self) -> SweepResult:
        """The checkpoint that the others are compared with: the first, softmax if it is there."""
        return self.results[0]

    @property
    def headline(self) -> str:
        """One sentence: what each width of the first target costs."""
        if not self.choices:
            return "Only unquantized models were measured so far."
        own = [choice for choice in self.choices if choice.target == self.targets[0]]
        changes = own[-1].changes
        least, most = min(changes, key=changes.__getitem__), max(changes, key=changes.__getitem__)
        several = len(changes) > 1
        costs = [f"{max(c.changes.values()):.4f} at {c.bits} bits" for c in own]
        ratios = f"{np.exp(changes[most]):.3g} times the perplexity"
        if several:
            ratios += f" for {most}, {np.exp(changes[least]):.3g} times for {least}"
        who = f"any of {len(changes)} checkpoints by at most" if several else f"{most} by"
        cost = f"{listed(costs)} (nats a token; at {own[-1].bits} bits that is {ratios})"
        rises = [r.summary["test loss change"].low for choice in own for r in choice.results]
        if max(rises) <= 0:
            cost += ", none of which these few texts show to be a rise"
        return f"Storing {what(own[0].target)} in few bits raises the loss of {who} {cost}."

    @property
    def schemes(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: what to take for each target at each width."""
        rows = []
        for choice in self.choices:
            margin = "nothing else was measured"
            if choice.second is not None:
                margin = choice.second
                if choice.margin is not None:
                    margin += f": {signed(choice.margin)}"
                    apart = choice.margin.low > 0 or choice.margin.high < 0
                    margin += "" if apart else ", not significant"
            rows.append([what(choice.target), str(choice.bits), choice.setting, margin])
        return ["quantized", "bits", "take", "the next best, and how much more loss"], rows

    @property
    def measures(self) -> list[str]:
        """By what the checkpoints can be compared."""
        return list(dict.fromkeys(each.measure for each in self.differences))

    def verdicts(self, measure: str) -> tuple[list[str], list[list[str]]]:
        """Return header and rows: which checkpoints differ from the baseline, and how many of all
        pairs differ."""
        name = self.baseline.checkpoint
        groups: dict[tuple[str, int], list[Difference]] = defaultdict(list)
        for each in self.differences:
            if each.measure == measure:
                groups[each.target, each.bits].append(each)
        digits = "z.4f" if measure == LOSS else ".2g"  # divergences of 8 bits are about 1e-5
        rows = []
        for (target, bits), pairs in groups.items():
            own = sorted((e for e in pairs if e.second == name), key=lambda e: e.rise.value)
            more, less = (
                [
                    f"{e.first} ({e.rise.value:+{digits}})"
                    for e in own[::-sign]
                    if e.significant and e.rise.value * sign > 0
                ]
                for sign in (1, -1)
            )
            same = [e.first for e in own if not e.significant]
            count = f"{sum(e.significant for e in pairs)} of {len(pairs)}"
            rows.append([what(target), str(bits), *map(listed, (more, less, same)), count])
        header = ["quantized", "bits", f"more {measure} than {name}", f"less {measure} than {name}"]
        return [*header, f"cannot be told from {name}", "pairs that differ"], rows

    @property
    def texts(self) -> tuple[list[str], list[list[str]]]:
        """Header and rows: what each choice costs on each text, mean of the checkpoints."""
        unquantized, rows = before(self.results), []
        titles = {"test": self.baseline.texts["measured"]} | TEXTS
        names = [text for text in titles if text in self.baseline.units["perplexity"]]
        for choice in self.choices:
            own = [result for result in choice.results if result.checkpoint in unquantized]
            if not own or not same_text(own):
                continue
            cells = []
            for text in names:
                changes = [losses(r, text) - losses(unquantized[r.checkpoint], text) for r in own]
                loss = signed(mean_interval(np.mean(changes, axis=0)))
                cells.append(f"{loss}; {mean_divergence(own, text):.5f}")
            rows.append([what(choice.target), str(choice.bits), *cells])
        return ["quantized", "bits", *(titles[text] for text in names)], rows
