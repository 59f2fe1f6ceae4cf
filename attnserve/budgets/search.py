"""The greedy search: again and again, shrink the layer whose shrinking moves the loss least.

The step is constant, but for two things. While a larger one costs nothing it is larger, since most
of a long context is free. And at the limit it is halved until no layer can give up one more token.
So searches with several limits have all but their ends in common.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from attn_kernels.variant import LEAST_BUDGET
from attnserve.budgets.evaluations import Losses
from attnserve.budgets.measured import Budgets, Measured

RULE = "selective"
FREE = 1e-4
"""Nats per token that a larger step may cost."""


class Point(NamedTuple):
    """Budgets, and each sequence's loss with them."""

    budgets: Budgets
    losses: Losses

    @property
    def loss(self) -> float:
        """Mean loss in nats per token."""
        return float(np.mean(self.losses))


class Descent:
    """Where a search is: budgets, and what each layer reads with them.

    Shrinking a layer changes only it and those above, so that what the layers below give is kept.

    Args:
        measured: the model on held-out text. Its budgets are full at first.
    """

    def __init__(self, measured: Measured) -> None:
        self.measured, self.budgets = measured, measured.full
        self._reads: list[Tensor] = []

    def measure(self, layer: int, budget: int) -> Point:
        """What these budgets would give with another one for a layer."""
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
        """The best point that is `step` tokens of one layer away, of equal ones the lowest layer's;
        None if no layer can give up so many."""
        points = [
            self.measure(layer, budget - step)
            for layer, budget in enumerate(self.budgets)
            if budget - step >= LEAST_BUDGET
        ]
        return min(points, key=lambda point: point.loss, default=None)

    def _run(self, layer: int, budgets: Budgets) -> Losses:
        forward, text = self.measured.forward, self.measured.text
        if not self._reads:
            self._reads.append(forward.embed(text.inputs))
        for below in range(len(self._reads) - 1, layer):
            own = self.budgets[below]
            self._reads.append(forward.layer(below, self._reads[below], own, RULE))
        hidden = self._reads[layer]
        for above in range(layer, len(budgets)):
            hidden = forward.layer(above, hidden, budgets[above], RULE)
        return forward.losses(hidden, text.targets)


def search(descent: Descent, step: int, limit: float) -> Iterator[Point]:
    """The path from full budgets, that point first, to the last one with a mean loss of at most
    `limit` nats per token.

    Args:
        descent: at its beginning.
        step: tokens that one layer gives up at a time.
        limit: see above.
    """
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
