"""A model on sequences of a text, whose every loss is measured once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from attnserve.budgets.evaluations import Evaluations, Losses
from attnserve.budgets.forward import Forward
from attnserve.budgets.texts import Texts
from attnserve.evaluation.checkpoint import Checkpoint

Budgets = tuple[int, ...]
"""Tokens that each layer keeps."""


@dataclass(frozen=True)
class Measured:
    """See the module.

    Attributes:
        checkpoint: the model's folder.
        forward: the model.
        text: the sequences.
        evaluations: what has been measured.
    """

    checkpoint: Checkpoint
    forward: Forward
    text: Texts
    evaluations: Evaluations

    @classmethod
    def on(cls, forward: Forward, text: Texts, runs: Path) -> Measured:
        """Return a model on a text, with the evaluations that `runs` has of the two."""
        checkpoint = forward.checkpoint
        about = {"checkpoint": checkpoint.digest, **text.about}
        name = f"{checkpoint.name}-{text.name.replace(' ', '_')}"
        return cls(checkpoint, forward, text, Evaluations(runs, name, about))

    @property
    def full(self) -> Budgets:
        """Budgets that keep everything."""
        return (self.text.inputs.shape[1],) * self.forward.layers

    def losses(
        self, rule: str, budgets: Budgets, measure: Callable[[], Losses] | None = None
    ) -> Losses:
        """Each sequence's loss with these budgets.

        Args:
            rule: of eviction.
            budgets: one a layer.
            measure: how to measure it, if there is a shorter way than a whole forward pass.
        """
        whole = measure or (lambda: self.forward(self.text, budgets, rule))
        key = f"random {self.forward.seed}" if rule == "random" else rule
        return self.evaluations(key, budgets, whole)
