"""Retrieval of a key that is planted in a long text."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.intervals import mean_interval, share_interval
from attnserve.evaluation.measures import Data, Measure, Result
from attnserve.evaluation.scorers import Item, Scorer
from training.analyze.length import multiples

INTRODUCTION = (
    "There is an important info hidden inside a lot of irrelevant text. Find it and memorize it. "
    "I will quiz you about the important information there.\n"
)
FILLER = (
    " The grass is green. The sky is blue. The sun is yellow. Here we go. There and back again."
)
PLANTED = " The pass key is {key}. Remember it. {key} is the pass key."
QUESTION = "\nWhat is the pass key? The pass key is"


def make_pair(checkpoint: Checkpoint, length: int, rng: np.random.Generator) -> tuple[Item, Item]:
    """Return a prompt of the passkey test (as of arXiv 2305.16300) with its answer, `length` tokens
    at most: an introduction, filler with the key at a random depth, and the question; then the
    same with another key in its place.
    """
    right, wrong = (str(key) for key in rng.choice(90000, 2, replace=False) + 10000)
    encode = checkpoint.encode
    opening, filler = [checkpoint.bos, *encode(INTRODUCTION)], encode(FILLER)
    planted = [encode(PLANTED.format(key=key)) for key in (right, wrong)]
    question, answer = encode(QUESTION), encode(" " + right)
    fixed = len(opening) + max(map(len, planted)) + len(question) + len(answer)
    repeats = (length - fixed) // len(filler)
    if repeats < 1:
        raise ValueError(
            f"{length} tokens have no room for the passkey test, whose prompt has "
            f"{fixed + len(filler)} at least with this tokenizer: leave it out with --measures"
        )
    before = int(rng.integers(repeats + 1))
    prompts = [
        opening + filler * before + sentence + filler * (repeats - before) + question
        for sentence in planted
    ]
    return Item(prompts[0], answer), Item(prompts[1], answer)


@dataclass(frozen=True)
class Passkey(Measure):
    """Can the model repeat a five-digit key from `1x` to `16x` its training length?

    Accuracy counts keys whose every token is the likeliest. A small model has none, so there is
    also the gain: the log-probability of the key after the prompt that holds it, less that after
    the same prompt with another key in its place. It is 0 for a model that does not see the key,
    whatever it thinks of numbers.

    Args:
        pairs: at the training length; half as many at each length twice as long, but at least 4.
        multiple: the longest prompt, in training lengths; a power of two.
        seed: of keys and depths.
    """

    name: ClassVar[str] = "passkey"
    counts: ClassVar[tuple[str, ...]] = ("pairs",)
    uses_length: ClassVar[bool] = True

    pairs: int = 32
    multiple: int = 16
    seed: int = 0

    def files(self, data: Data) -> list[Path]:
        return []

    def longest(self, checkpoint: Checkpoint) -> int:
        return self.multiple * checkpoint.context

    def run(self, checkpoint: Checkpoint, data: Data, scorer: Scorer) -> Result:
        pairs = {}
        for m in multiples(self.multiple):
            rng = np.random.default_rng([self.seed, m])
            count = max(min(4, self.pairs), self.pairs // m)
            pairs[m] = [make_pair(checkpoint, m * checkpoint.context, rng) for _ in range(count)]
        items = [item for m in pairs for pair in pairs[m] for item in pair]
        scores = iter(scorer.score(items, self.name))
        summary, units = {}, {}
        for m in pairs:
            scored = [(next(scores), next(scores)) for _ in pairs[m]]
            right = [float(r.logprobs.sum()) for r, _ in scored]
            gain = [r.total - w.total for r, w in scored]
            hits = [bool(r.greedy.all()) for r, _ in scored]
            summary[f"accuracy at {m}x"] = share_interval(sum(hits), len(hits))
            summary[f"gain at {m}x"] = mean_interval(gain)
            summary[f"log-probability at {m}x"] = mean_interval(right)
            units[str(m)] = {
                "hits": [int(hit) for hit in hits],
                "gain": np.round(gain, 5).tolist(),
                "logprob": np.round(right, 5).tolist(),
            }
        return Result(summary, units)
