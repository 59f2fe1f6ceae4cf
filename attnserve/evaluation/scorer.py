"""The one question that measures ask a model: how likely is this text after that one?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Item:
    """Token ids: a prompt (at least one token) and what comes after it (at least one token)."""

    prompt: list[int]
    continuation: list[int]

    @property
    def tokens(self) -> list[int]:
        """Prompt and continuation."""
        return self.prompt + self.continuation


@dataclass(frozen=True)
class Scored:
    """What a model says of a continuation's tokens, each given all tokens before it."""

    logprobs: NDArray[np.float64]
    """`[num_tokens]`, natural logarithms."""
    greedy: NDArray[np.bool_]
    """`[num_tokens]`: no other token is as likely."""

    @property
    def total(self) -> float:
        """Log-probability of the whole continuation."""
        return float(self.logprobs.sum())


class Scorer(Protocol):
    """A model that scores items. Computes in float32, whatever the checkpoint's dtype."""

    def score(self, items: Sequence[Item], label: str) -> list[Scored]:
        """Score each item, in order.

        Args:
            items: no longer than the scorer's longest.
            label: what the progress bar says.
        """
        ...

    def close(self) -> None:
        """Give the model's memory and processes back."""
        ...
