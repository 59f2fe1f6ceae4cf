"""Do outliers explain which checkpoint loses most? Rank correlation over checkpoints."""

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import stats

from quant.config import UNQUANTIZED, QuantConfig
from quant.outliers import FIGURES
from quant.store import SweepResult

FEWEST = 4  # checkpoints: with fewer, no order of them has a probability below 5 %
LEVEL = 0.05


@dataclass(frozen=True)
class Explanation:
    """How the cost of quantizing something goes with a statistic of outliers, over checkpoints."""

    target: str  # what is quantized
    statistic: str  # mean of the linear layers
    # Spearman's, of the statistic and the checkpoints' mean rank of divergence over all
    # settings and bits.
    correlation: float
    chance: float  # the share of all orders of the checkpoints whose correlation is as high
    checkpoints: int  # number of them

    @property
    def verdict(self) -> str:
        """Whether the correlation is positive and rarer than one in twenty."""
        if self.checkpoints < FEWEST:
            return f"cannot be told with fewer than {FEWEST} checkpoints"
        return "explains it" if self.chance < LEVEL else "does not explain it"


def spearman(a: ArrayLike, b: ArrayLike) -> tuple[float, float]:
    """Return the rank correlation, 0 if one of them is constant, and the share of all orders of `b`
    that give one as high (of 10,000 orders, where there are more than 7 values)."""
    ranks = [stats.rankdata(values) for values in (a, b)]
    if any(np.ptp(values) == 0 for values in ranks):
        return 0.0, 1.0
    first, second = map(stats.zscore, ranks)
    test = stats.permutation_test(
        (second,),
        lambda order, axis: (first * order).mean(axis),
        permutation_type="pairings",
        alternative="greater",
        vectorized=True,
        rng=np.random.default_rng(0),
    )
    return float(test.statistic), float(test.pvalue)


def statistics(unquantized: Sequence[SweepResult]) -> dict[str, list[float]]:
    """Return each statistic of outliers, a value a checkpoint."""
    return {
        f"{kind}s: {figure}": [
            float(np.mean([layer[place] for layer in result.details[f"{kind} outliers"].values()]))
            for result in unquantized
        ]
        for kind in ("weight", "input")
        for place, figure in enumerate(FIGURES)
    }


def mean_ranks(results: Sequence[SweepResult]) -> dict[str, NDArray[np.floating[Any]]]:
    """Return for each target the checkpoints' mean ranks of divergence over all settings and bits,
    the least first. Only configs that all checkpoints have count."""
    names = [result.checkpoint for result in results if result.config == UNQUANTIZED]
    costs: dict[QuantConfig, dict[str, float]] = defaultdict(dict)
    for result in results:
        if "test KL" in result.summary and math.isfinite(result.summary["test KL"].value):
            costs[result.config][result.checkpoint] = result.summary["test KL"].value
    ranks: dict[str, list[NDArray[np.floating[Any]]]] = defaultdict(list)
    for config, cost in costs.items():
        if names and set(names) <= set(cost):
            ranks[config.target].append(stats.rankdata([cost[name] for name in names]))
    return {target: np.mean(found, axis=0) for target, found in ranks.items()}


def explanations(results: Sequence[SweepResult]) -> list[Explanation]:
    """Return an explanation for each target and statistic."""
    unquantized = [result for result in results if result.config == UNQUANTIZED]
    return [
        Explanation(target, statistic, *spearman(values, ranks), len(unquantized))
        for target, ranks in mean_ranks(results).items()
        for statistic, values in statistics(unquantized).items()
    ]


def in_short(found: Sequence[Explanation]) -> str:
    """Return one sentence for each target."""
    sentences = []
    for target in dict.fromkeys(e.target for e in found):
        own = [e for e in found if e.target == target]
        if own[0].checkpoints < FEWEST:
            return f"This {own[0].verdict}."
        good = [e.statistic for e in own if e.verdict == "explains it"]
        which = f"goes with {' and '.join(good)}" if good else "goes with none of the outliers"
        sentences.append(f"Which variant loses most with quantized {target} {which}.")
    return " ".join(sentences)
