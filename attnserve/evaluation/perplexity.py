"""Perplexity of held-out texts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from attnserve.evaluation.books import split
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.evaluate import Score
from attnserve.evaluation.intervals import Estimate, mean_interval
from attnserve.evaluation.measures import Data, Measure, Result
from attnserve.evaluation.scorers import Item, Scorer

TEXTS = ("validation", "test", "wikitext2")


@dataclass(frozen=True)
class Perplexity(Measure):
    """Perplexity per token, word and byte of the held-out books and of WikiText-2's test text, from
    their beginnings, as training sees text: in sequences that each start anew.

    Args:
        sequences: of each text, of the training length.
    """

    name: ClassVar[str] = "perplexity"
    title: ClassVar[str] = "perplexity of held-out books and of WikiText-2"
    counts: ClassVar[tuple[str, ...]] = ("sequences",)

    sequences: int = 128

    def files(self, data: Data) -> list[Path]:
        books = split(data.books)
        return [books.validation, books.test, data.sets / "wikitext2_test_raw.txt"]

    def run(self, checkpoint: Checkpoint, data: Data, scorer: Scorer) -> Result:
        summary: dict[str, Estimate] = {}
        units: dict[str, Any] = {}
        for name, file in zip(TEXTS, self.files(data), strict=True):
            tokens = checkpoint.encode(file.read_text(encoding="utf-8"))
            tokens = tokens[: self.sequences * checkpoint.context]
            starts = range(0, len(tokens), checkpoint.context)
            pieces = [tokens[start : start + checkpoint.context] for start in starts]
            figures, units[name] = score_text(checkpoint, scorer, name, pieces)
            summary |= figures
        return Result(summary, units)


def score_text(
    checkpoint: Checkpoint, scorer: Scorer, name: str, pieces: Sequence[list[int]]
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """Return perplexity per token, word and byte of a text with its loss, and the losses of its
    pieces (nats per token) with the text's size.

    Args:
        checkpoint: whose tokens they are.
        scorer: of that checkpoint.
        name: of the text, which begins the figures' names.
        pieces: token ids; each is read after the begin-of-text token alone.
    """
    summary = {}
    tokens = [token for piece in pieces for token in piece]
    text = checkpoint.tokenizer.decode(tokens)
    items = [Item([checkpoint.bos], piece) for piece in pieces]
    scores = scorer.score(items, f"{Perplexity.name}, {name}")
    total = sum(scored.total for scored in scores)
    score = Score("model", name, total, len(tokens), len(text.split()), len(text.encode()))
    # The last sequence may be short: its loss counts for as many tokens as it has.
    losses = [-s.total for s in scores]
    loss = mean_interval([value * len(pieces) / len(tokens) for value in losses])
    summary[f"{name} loss"] = loss
    for unit, count in (
        ("token", score.tokens),
        ("word", score.words),
        ("byte", score.bytes),
    ):
        nats = Estimate(*(value * score.tokens / count for value in loss))
        summary[f"{name} per {unit}"] = nats.exp()
    assert math.isclose(summary[f"{name} per token"].value, score.per_token, rel_tol=1e-6)
    units = {
        "tokens": score.tokens,
        "words": score.words,
        "bytes": score.bytes,
        "sequence_losses": [
            round(value / len(piece), 5) for value, piece in zip(losses, pieces, strict=True)
        ],
    }
    return summary, units
