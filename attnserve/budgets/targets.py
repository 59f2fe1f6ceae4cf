"""The search with several limits, each judged on more text than the search looks at."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from attnserve.budgets.measured import Budgets, Measured
from attnserve.budgets.search import RULE, Descent, Point, search
from attnserve.evaluation.intervals import Estimate, mean_interval

BEYOND = 0.05
"""Nats per token by which the path goes on behind the last target, for the curve."""


@dataclass(frozen=True)
class Target:
    """The smallest budgets that the search found for an allowed loss.

    Attributes:
        name: the reference's name, "+1 %" (perplexity over the unpruned model's) or "max-loss".
        max_loss: nats per token on the judged sequences of the validation text.
        budgets: one a layer; the whole length where even the unpruned model is above `max_loss`.
        loss: with them, on the judged sequences.
        reached: it is at most `max_loss`.
    """

    name: str
    max_loss: float
    budgets: list[int]
    loss: float
    reached: bool


@dataclass(frozen=True)
class Validation:
    """The validation text.

    Attributes:
        looked_at: the model on the sequences by which the search chooses.
        judged: the model on more of them, by which a target counts as reached.
        reference: the reference on the sequences of `judged`; None: there is none.
        step: the search's.
    """

    looked_at: Measured
    judged: Measured
    reference: Measured | None
    step: int

    @property
    def unpruned(self) -> Estimate:
        """The model's loss on the judged sequences."""
        return mean_interval(self.judged.losses(RULE, self.judged.full))

    @property
    def allowance(self) -> Estimate | None:
        """How many nats the reference is above the model there, sequence by sequence."""
        if self.reference is None:
            return None
        own = self.judged.losses(RULE, self.judged.full)
        other = self.reference.losses("none", self.reference.full)
        return mean_interval(np.array(other) - np.array(own))

    def path(self, rise: float) -> list[Point]:
        """The search's path to a rise of the loss over the unpruned model's."""
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
        """The last point of a path whose loss on the judged sequences is at most `max_loss`, and
        the path. It has full budgets if there is none."""
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
    """All targets, `(name, max_loss)` each, and the rise of the loss at each point of all paths."""
    reached = [validation.reach(name, limit) for name, limit in limits]
    farthest = max(0.0, *(limit - validation.unpruned.value for _, limit in limits)) + BEYOND
    points = [point for _, path in reached for point in path] + validation.path(farthest)
    unpruned = np.mean(validation.looked_at.losses(RULE, validation.looked_at.full))
    path = {point.budgets: float(point.loss - unpruned) for point in points}
    return [target for target, _ in reached], path


def higher(loss: float, percent: float) -> float:
    """The loss of a perplexity that is this much higher."""
    return loss + math.log1p(percent / 100)
