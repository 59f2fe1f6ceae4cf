"""Two searches for budgets, with several limits each, judged on more text than they look at.

By thresholds: each layer keeps what is masked by less than one threshold, the same in all layers,
of which the lowest of `THRESHOLDS` is found for each limit. A few evaluations, however many layers
there are.

Greedy: again and again, shrink the layer whose shrinking moves the loss least. As many evaluations
a step as there are layers.

The greedy step is constant, but for two things. While a larger one costs nothing it is larger,
since most of a long context is free. And at the limit it is halved until no layer can give up one
more token. So searches with several limits have all but their ends in common.
"""

import math
import sys
from bisect import bisect_left
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from torch import Tensor
from tqdm import tqdm

from attn_kernels.variant import LEAST_BUDGET
from attnserve.budgets.model import Budgets, Losses, Measured
from attnserve.evaluation.intervals import Estimate, mean_interval

RULE = "selective"
FREE = 1e-4  # nats per token that a larger step may cost
THRESHOLDS = tuple(2 ** (half / 2) for half in range(-20, 19))  # 2^-10 to 2^9, in units of scores
BEYOND = 0.05  # nats per token by which the path goes on behind the last target, for the curve


class Point(NamedTuple):
    """Budgets, and each sequence's loss with them."""

    budgets: Budgets
    losses: Losses

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return float(np.mean(self.losses))


class Descent:
    """The state of a search: budgets, full at first, and what each layer reads with them.

    Shrinking a layer changes only it and those above, so that what the layers below give is
    kept.
    """

    def __init__(self, measured: Measured) -> None:
        self.measured, self.budgets = measured, measured.full
        self._reads: list[Tensor] = []

    def measure(self, layer: int, budget: int) -> Point:
        """Return what these budgets would give with another one for a layer."""
        budgets = (*self.budgets[:layer], budget, *self.budgets[layer + 1 :])
        return Point(
            budgets, self.measured.losses(RULE, budgets, lambda: self._run(layer, budgets))
        )

    def accept(self, budgets: Budgets) -> None:
        """Go on from other budgets."""
        pairs = zip(self.budgets, budgets, strict=True)
        same = next((i for i, (a, b) in enumerate(pairs) if a != b), len(budgets))
        self._reads = self._reads[: same + 1]
        self.budgets = budgets

    def shrunk(self, step: int) -> Point | None:
        """Return the best point that is `step` tokens of one layer away, of equal ones the lowest
        layer's; None if no layer can give up so many."""
        points = [
            self.measure(layer, budget - step)
            for layer, budget in enumerate(self.budgets)
            if budget - step >= LEAST_BUDGET
        ]
        return min(points, key=lambda point: point.loss, default=None)

    def _run(self, layer: int, budgets: Budgets) -> Losses:
        forward, text = self.measured.forward, self.measured.text
        if not self._reads:
            self._reads.append(forward.embed(text.rows[:, :-1]))
        for below in range(len(self._reads) - 1, layer):
            own = self.budgets[below]
            self._reads.append(forward.layer(below, self._reads[below], own, RULE))
        hidden = self._reads[layer]
        for above in range(layer, len(budgets)):
            hidden = forward.layer(above, hidden, budgets[above], RULE)
        return forward.losses(hidden, text.rows[:, 1:])


def search(descent: Descent, step: int, limit: float) -> Iterator[Point]:
    """Yield the path from full budgets, that point first, to the last one with a mean loss of at
    most `limit` nats per token; `step` is how many tokens a layer gives up at a time."""
    point = descent.measure(0, descent.budgets[0])
    yield point
    size = step
    while 2 * size <= max(descent.budgets) // 4:
        size *= 2
    while size:
        best = descent.shrunk(size)
        most = limit if size <= step else min(limit, point.loss + FREE)
        if best is None or best.loss > most:
            size //= 2
        else:
            point = best
            descent.accept(point.budgets)
            yield point


@dataclass(frozen=True)
class Target:
    """The smallest budgets that the search found for an allowed loss."""

    name: str  # the reference's name, "+1 %" (perplexity over the unpruned model's) or "max-loss"
    max_loss: float  # nats per token on the judged sequences of the validation text
    # One a layer; the whole length where even the unpruned model is above `max_loss`.
    budgets: list[int]
    loss: float  # with them, on the judged sequences
    reached: bool  # it is at most `max_loss`


@dataclass(frozen=True)
class Validation:
    """The model and its reference on the validation text."""

    looked_at: Measured  # the model on the sequences by which the search chooses
    judged: Measured  # the model on more of them, by which a target counts as reached
    reference: Measured | None  # the reference on the sequences of `judged`; None: there is none
    step: int  # the search's

    @property
    def unpruned(self) -> Estimate:
        """Return the model's loss on the judged sequences."""
        return mean_interval(self.judged.losses(RULE, self.judged.full))

    @property
    def allowance(self) -> Estimate | None:
        """Return how many nats the reference is above the model there, sequence by sequence."""
        if self.reference is None:
            return None
        own = self.judged.losses(RULE, self.judged.full)
        other = self.reference.losses("none", self.reference.full)
        return mean_interval(np.array(other) - np.array(own))

    def path(self, rise: float) -> list[Point]:
        """Return the search's path to a rise of the loss over the unpruned model's."""
        start = Point(self.looked_at.full, self.looked_at.losses(RULE, self.looked_at.full))
        points = []
        total = sum(start.budgets)
        with tqdm(total=total, desc=f"at most +{rise:.4f} nats", unit="token") as bar:
            for point in search(Descent(self.looked_at), self.step, start.loss + rise):
                budgets = " ".join(map(str, point.budgets))
                bar.set_postfix(budgets=budgets, loss=f"{point.loss:.4f}", refresh=False)
                bar.update(total - sum(point.budgets) - bar.n)
                points.append(point)
        return points

    def reach(self, name: str, max_loss: float) -> tuple[Target, list[Point]]:
        """Return the last point of a path whose loss on the judged sequences is at most
        `max_loss`, and the path. It has full budgets if there is none."""
        rise = max_loss - self.unpruned.value
        points = self.path(rise) if rise >= 0 else []
        for point in reversed(points):
            loss = float(np.mean(self.judged.losses(RULE, point.budgets)))
            if loss <= max_loss:
                return Target(name, max_loss, list(point.budgets), loss, True), points
        full = list(self.judged.full)
        return Target(name, max_loss, full, self.unpruned.value, False), points


def find(
    validation: Validation, limits: Sequence[tuple[str, float]]
) -> tuple[list[Target], dict[Budgets, float]]:
    """Return all targets, of which `limits` has `(name, max_loss)`, and the rise of the loss at
    each point of all paths."""
    reached = [validation.reach(name, limit) for name, limit in limits]
    farthest = max(0.0, *(limit - validation.unpruned.value for _, limit in limits)) + BEYOND
    points = [point for _, path in reached for point in path] + validation.path(farthest)
    unpruned = np.mean(validation.looked_at.losses(RULE, validation.looked_at.full))
    path = {point.budgets: float(point.loss - unpruned) for point in points}
    return [target for target, _ in reached], path


def by_thresholds(
    validation: Validation, limits: Sequence[tuple[str, float]]
) -> tuple[list[Target], dict[Budgets, float]]:
    """Return what `find` does, of budgets by `THRESHOLDS`, all judged on the same sequences."""
    looked_at, judged = validation.looked_at, validation.judged
    unpruned, rises = validation.unpruned.value, {judged.full: 0.0}

    def rise_of(budgets: Budgets) -> float:
        if budgets not in rises:
            rises[budgets] = float(np.mean(judged.losses(RULE, budgets))) - unpruned
            mean = sum(budgets) / len(budgets)
            print(f"{mean:.1f} tokens a layer: {rises[budgets]:+.4f} nats", file=sys.stderr)
        return rises[budgets]

    needed = looked_at.forward.needed(looked_at.text, THRESHOLDS)
    tried = sorted({*needed, looked_at.full}, key=sum)

    def smallest(limit: float) -> Budgets | None:
        place = bisect_left(tried, True, key=lambda budgets: rise_of(budgets) <= limit - unpruned)
        return tried[place] if place < len(tried) else None

    targets = []
    for name, limit in limits:
        found = smallest(limit)
        best = found or judged.full
        targets.append(Target(name, limit, list(best), unpruned + rises[best], found is not None))
    smallest(max(limit for _, limit in limits) + BEYOND)  # for the curve
    return targets, rises


def equal(
    validation: Validation, limits: Sequence[tuple[str, float]], sizes: Collection[int]
) -> tuple[list[Target], dict[Budgets, float]]:
    """Return what `find` does, without a search: of budgets that are equal in all layers, `sizes`
    and the whole length, the smallest within each limit. All are judged on the same sequences."""
    judged, unpruned = validation.judged, validation.unpruned.value
    layers = len(judged.full)
    tried = [judged.full, *((size,) * layers for size in sizes)]
    losses = {budgets: float(np.mean(judged.losses(RULE, budgets))) for budgets in tried}
    targets = []
    for name, limit in limits:
        within = [budgets for budgets, loss in losses.items() if loss <= limit]
        best = min(within, key=sum, default=judged.full)
        targets.append(Target(name, limit, list(best), losses[best], bool(within)))
    return targets, {budgets: loss - unpruned for budgets, loss in losses.items()}


def higher(loss: float, percent: float) -> float:
    """Return the loss of a perplexity that is this much higher."""
    return loss + math.log1p(percent / 100)
