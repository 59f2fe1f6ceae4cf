"""The order in which training sees a text's tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from attnserve.errors import UserError
from attnserve.evaluation.texts import Tokens


def fingerprint(tokens: Tokens) -> str:
    """Return a hash that tells whether two runs train on the same tokens."""
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:16]


def sequence(tokens: Tokens, start: int, context: int, bos: int) -> tuple[Tokens, Tokens]:
    """Return inputs and targets, both at most `[context]`.

    A model reads the begin-of-text token and predicts `tokens[start : start + context]` from it
    and from one another.
    """
    targets = tokens[start : start + context]
    return np.concatenate(([bos], targets[:-1])), targets


@dataclass(frozen=True)
class Batches:
    """Training batches as a function of the step number, so that a resumed run needs no state.

    Every epoch cuts the text into sequences of `context` tokens at a new offset and shuffles them;
    `bos`, the begin-of-text token, starts each. The order depends on the seed, not on the model.
    """

    tokens: Tokens
    context: int
    batch: int
    bos: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.tokens) < 2 * self.context:
            raise UserError(
                f"{len(self.tokens)} tokens of text are too few for sequences of {self.context}: "
                "name more --data or shorter sequences"
            )

    @property
    def sequences_per_epoch(self) -> int:
        """Return how many sequences fit, whatever the epoch's offset."""
        return len(self.tokens) // self.context - 1

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a step, both `[batch, context]` int64."""
        starts = map(self._start, range(step * self.batch, (step + 1) * self.batch))
        pairs = [sequence(self.tokens, start, self.context, self.bos) for start in starts]
        inputs, targets = (torch.from_numpy(np.stack(rows)) for rows in zip(*pairs, strict=True))
        return inputs, targets

    def _start(self, number: int) -> int:
        epoch, index = divmod(number, self.sequences_per_epoch)
        generator = np.random.default_rng([self.seed, epoch])
        offset = int(generator.integers(self.context))
        return offset + int(generator.permutation(self.sequences_per_epoch)[index]) * self.context
