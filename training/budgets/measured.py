"""A model on sequences of a text, whose every loss is measured once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from training.analyze.measure import Checkpoint, digest
from training.budgets.evaluations import Evaluations, Losses
from training.budgets.forward import Forward, Texts

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
    def on(cls, forward: Forward, file: Path, length: int, sequences: int, runs: Path) -> Measured:
        """A model on sequences of a file.

        Args:
            forward: the model.
            file: the text.
            length: tokens of a sequence.
            sequences: how many, spread over the text.
            runs: folder of the evaluations.

        Raises:
            Refusal: the text is too short.
        """
        checkpoint = forward.checkpoint
        about = {
            "checkpoint": checkpoint.digest,
            "text": digest(file),
            "length": length,
            "sequences": sequences,
        }
        text = Texts(checkpoint, file, length, sequences)
        name = f"{checkpoint.name}-{file.stem}"
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
