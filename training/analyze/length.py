"""Loss by position, in windows many times longer than the training sequences."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.intervals import mean_interval
from attnserve.evaluation.measures import Data, Measure, Result
from attnserve.evaluation.scorers import Item, Scorer
from attnserve.evaluation.texts import Tokens, read_tokens

BINS = 4
"""Bins that a training length is cut into."""


def multiples(longest: int) -> list[int]:
    """1, 2, 4, ... up to `longest`."""
    return [2**power for power in range(longest.bit_length())]


@dataclass(frozen=True)
class Length(Measure):
    """Loss in nats per token on windows of the test text, without retraining.

    Each window starts with the begin-of-text token. A token's loss depends on what stands before
    it only, so one pass over the longest windows gives those of all shorter ones. The same tokens
    are also read in pieces of the training length that each start anew: what a longer context
    brings or costs is the difference, which does not depend on how hard the text is.

    Args:
        windows: spread evenly over the book, without overlap.
        multiple: length of a window, in training lengths; a power of two.
    """

    name: ClassVar[str] = "length"
    counts: ClassVar[tuple[str, ...]] = ("windows",)
    uses_length: ClassVar[bool] = True

    windows: int = 6
    multiple: int = 16

    def files(self, data: Data) -> list[Path]:
        return [data.test]

    def longest(self, checkpoint: Checkpoint) -> int:
        return self.multiple * checkpoint.context + 1

    def run(self, checkpoint: Checkpoint, data: Data, scorer: Scorer) -> Result:
        if checkpoint.context % BINS:
            raise ValueError(f"the training length must be a multiple of {BINS}: give --context")
        tokens = read_tokens(self.files(data), checkpoint.tokenizer)[:-1]
        length = self.multiple * checkpoint.context
        fitting = len(tokens) // length
        if fitting < 2:
            raise ValueError(
                f"{data.test.name} has {len(tokens)} tokens, too few for two windows of {length}: "
                "lower --max-length, or give more text"
            )
        chosen = tokens[: fitting * length].reshape(fitting, length)
        chosen = chosen[np.linspace(0, fitting - 1, min(self.windows, fitting)).astype(int)]
        long = self._bins(checkpoint, scorer, chosen, "windows")
        pieces = chosen.reshape(-1, checkpoint.context)
        short = self._bins(checkpoint, scorer, pieces, "pieces").reshape(long.shape)
        summary = {"loss of pieces of 1x": mean_interval(short.mean(1))}
        for m in multiples(self.multiple):
            end = m * BINS
            summary[f"loss of windows of {m}x"] = mean_interval(long[:, :end].mean(1))
            if m > 1:
                rise = (long - short)[:, :end].mean(1)
                summary[f"rise of windows of {m}x over pieces"] = mean_interval(rise)
        units = {
            "bin_tokens": checkpoint.context // BINS,
            "windows": long.round(5).tolist(),
            "pieces": short.round(5).tolist(),
        }
        return Result(summary, units)

    def _bins(
        self, checkpoint: Checkpoint, scorer: Scorer, texts: Tokens, label: str
    ) -> NDArray[np.float64]:
        """Mean loss of each bin, `[texts, bins]`, of texts `[texts, num_tokens]`."""
        items = [Item([checkpoint.bos], row.tolist()) for row in texts]
        scores = scorer.score(items, f"{self.name}, {label}")
        losses = np.stack([-scored.logprobs for scored in scores])
        return losses.reshape(len(items), -1, checkpoint.context // BINS).mean(-1)
