"""Do outliers explain which checkpoint loses most? Rank correlation over checkpoints."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from quant.config import QuantConfig
from quant.outliers import FIGURES
from quant.store import Stored

FEWEST = 4
"""Checkpoints: with fewer, no order of them has a probability below 5 %."""
LEVEL = 0.05

Values = NDArray[np.floating[Any]]


@dataclass(frozen=True)
class Explanation:
    """How the cost of quantizing something goes with a statistic of outliers, over checkpoints.

    Args:
        target: is quantized.
        statistic: mean of the linear layers.
        correlation: Spearman's, of the statistic and the checkpoints' mean rank of divergence over
            all settings and widths.
        chance: the share of all orders of the checkpoints whose correlation is as high.
        checkpoints: number of them.
    """

    target: str
    statistic: str
    correlation: float
    chance: float
    checkpoints: int

    @property
    def verdict(self) -> str:
        """Positive and rarer than one in twenty, or not."""
        if self.checkpoints < FEWEST:
            return f"cannot be told with fewer than {FEWEST} checkpoints"
        return "explains it" if self.chance < LEVEL else "does not explain it"


def ranks(values: Values) -> Values:
    """1 for the smallest; equal values share their mean rank."""
    return np.array([1 + (values < v).sum() + ((values == v).sum() - 1) / 2 for v in values])


def correlation(a: Values, b: Values) -> float:
    """Pearson's; 0 if one of them is constant."""
    a, b = a - a.mean(), b - b.mean()
    size = float(np.sqrt((a @ a) * (b @ b)))
    return float(a @ b) / size if size else 0.0


def spearman(a: Values, b: Values) -> tuple[float, float]:
    """Rank correlation, and the share of all orders of `b` that give one as high."""
    first, second = ranks(a), ranks(b)
    found = correlation(first, second)
    orders = itertools.permutations(range(len(b)))
    as_high = [correlation(first, second[list(order)]) >= found - 1e-12 for order in orders]
    return found, float(np.mean(as_high))


def statistics(unquantized: Sequence[Stored]) -> dict[str, Values]:
    """Each statistic of outliers, a value a checkpoint."""
    return {
        f"{kind}s: {figure}": np.array(
            [
                np.mean([layer[place] for layer in stored.details[f"{kind} outliers"].values()])
                for stored in unquantized
            ]
        )
        for kind in ("weight", "input")
        for place, figure in enumerate(FIGURES)
    }


def explanations(results: Sequence[Stored]) -> list[Explanation]:
    """For everything that was quantized, and each statistic. Only cells that all checkpoints have
    count."""
    unquantized = [stored for stored in results if stored.config == QuantConfig()]
    names = [stored.checkpoint for stored in unquantized]
    costs: dict[QuantConfig, dict[str, float]] = defaultdict(dict)
    for stored in results:
        if "test KL" in stored.summary:
            costs[stored.config][stored.checkpoint] = stored.summary["test KL"].value
    places: dict[str, list[Values]] = defaultdict(list)
    for config, cost in costs.items():
        if names and set(names) <= set(cost):
            places[config.target].append(ranks(np.array([cost[name] for name in names])))
    return [
        Explanation(target, statistic, *spearman(values, np.mean(found, axis=0)), len(names))
        for target, found in places.items()
        for statistic, values in statistics(unquantized).items()
    ]


def in_short(found: Sequence[Explanation]) -> str:
    """One sentence for each thing that is quantized."""
    sentences = []
    for target in dict.fromkeys(e.target for e in found):
        own = [e for e in found if e.target == target]
        if own[0].checkpoints < FEWEST:
            return f"This {own[0].verdict}."
        good = [e.statistic for e in own if e.verdict == "explains it"]
        which = f"goes with {' and '.join(good)}" if good else "goes with none of the outliers"
        sentences.append(f"Which variant loses most with quantized {target} {which}.")
    return " ".join(sentences)
