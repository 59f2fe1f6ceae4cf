"""LAMBADA: the last word of a passage."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from attnserve.evaluation.intervals import mean_interval, share_interval
from attnserve.evaluation.measure import Checkpoint, Data, Measure, Result
from attnserve.evaluation.scorer import Item, Scorer


def spread(count: int, of: int) -> list[int]:
    """`count` indices below `of` at even distances; all of them if there are no more."""
    return [int(i) for i in np.linspace(0, of - 1, min(count, of)).round()]


@dataclass(frozen=True)
class Lambada(Measure):
    """Accuracy (every token of the word is the likeliest) and perplexity per word, as lm-eval has
    them, on passages at even distances.

    Args:
        passages: of the 5153 of the test set.
    """

    name: ClassVar[str] = "lambada"
    title: ClassVar[str] = "LAMBADA, last word"
    counts: ClassVar[tuple[str, ...]] = ("passages",)

    passages: int = 1000

    def files(self, data: Data) -> list[Path]:
        return [data.sets / "lambada_test.jsonl"]

    def longest(self, checkpoint: Checkpoint) -> int:
        # Passages have 200 words at most. Beyond the training length a model may well fail.
        return max(1024, checkpoint.context) + 1

    def run(self, checkpoint: Checkpoint, data: Data, scorer: Scorer) -> Result:
        lines = self.files(data)[0].read_text(encoding="utf-8").splitlines()
        texts = [json.loads(lines[i])["text"] for i in spread(self.passages, len(lines))]
        items = []
        for text in texts:
            context, _, word = text.rpartition(" ")
            prompt = [checkpoint.bos, *checkpoint.encode(context)]
            items.append(Item(prompt, checkpoint.encode(" " + word)))
        scores = scorer.score(items, self.name)
        hits = [bool(scored.greedy.all()) for scored in scores]
        losses = [-scored.total for scored in scores]
        summary = {
            "accuracy": share_interval(sum(hits), len(hits)),
            "perplexity per word": mean_interval(losses).exp(),
        }
        units = {"hits": [int(hit) for hit in hits], "losses": np.round(losses, 4).tolist()}
        return Result(summary, units)
