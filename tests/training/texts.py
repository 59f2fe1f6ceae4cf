"""Small texts in the shape of the evaluation data, and a model that copies."""

from __future__ import annotations

import itertools
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from attnserve.evaluation.scorers import Item, Scored
from tests.tiny import LICENSE


def write_texts(folder: Path) -> tuple[Path, Path]:
    """Return a folder of books and one of evaluation sets, of the licence's words; returns both."""
    books, evaluation = folder / "books", folder / "eval"
    (evaluation / "blimp").mkdir(parents=True)
    books.mkdir()
    words = LICENSE.read_text().split()
    for seed, name in enumerate(("first", "second", "emma", "great_expectations")):
        order = np.random.default_rng(seed).permutation(len(words))[:1200]
        (books / f"{name}.txt").write_text(" ".join(words[i] for i in order))
    (evaluation / "wikitext2_test_raw.txt").write_text(" = Heading = \n" + " ".join(words[:300]))
    passages = [{"text": " ".join(words[i * 20 : i * 20 + 15])} for i in range(6)]
    write_lines(evaluation / "lambada_test.jsonl", passages)
    for index, name in enumerate(("first_set", "second_set")):
        pairs = [
            {"sentence_good": " ".join(w), "sentence_bad": " ".join(reversed(w))}
            for w in (words[i : i + 5] for i in range(index, 40, 10))
        ]
        write_lines(evaluation / "blimp" / f"{name}.jsonl", pairs)
    return books, evaluation


def write_lines(path: Path, rows: Sequence[dict[str, str]]) -> None:
    """One JSON object a line."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


class Copier:
    """A scorer that can be checked by hand: a token's probability is how often it came after the
    token before it, with one more for each of 1000 tokens. It finds planted keys at any distance,
    or within `reach` tokens only."""

    device = "cpu"

    def __init__(self, reach: int | None = None) -> None:
        self.reach = reach

    def score(self, items: Sequence[Item], label: str) -> list[Scored]:
        """See `Scorer`."""
        return [self._one(item) for item in items]

    def _one(self, item: Item) -> Scored:
        logprobs, greedy = [], []
        for end in range(len(item.prompt), len(item.tokens)):
            start = 0 if self.reach is None else max(0, end - self.reach)
            seen, token = item.tokens[start:end], item.tokens[end]
            after = Counter(b for a, b in itertools.pairwise(seen) if a == seen[-1])
            logprobs.append(math.log((after[token] + 1) / (after.total() + 1000)))
            rivals = [count for other, count in after.items() if other != token]
            greedy.append(after[token] > max(rivals, default=0))
        return Scored(np.array(logprobs), np.array(greedy))

    def close(self) -> None:
        """See `Scorer`."""
