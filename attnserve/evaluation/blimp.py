"""BLiMP: which of two sentences is grammatical?"""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from attnserve.evaluation.intervals import mean_share_interval, share_interval
from attnserve.evaluation.lambada import spread
from attnserve.evaluation.measure import Checkpoint, Data, Measure, Result
from attnserve.evaluation.scorer import Item, Scorer


@dataclass(frozen=True)
class Blimp(Measure):
    """Share of minimal pairs whose grammatical sentence is the more likely one as a whole.

    Args:
        pairs: of the 1000 of each set, at even distances.
    """

    name: ClassVar[str] = "blimp"
    title: ClassVar[str] = "BLiMP, grammatical against ungrammatical sentences"
    counts: ClassVar[tuple[str, ...]] = ("pairs",)

    pairs: int = 200

    def files(self, data: Data) -> list[Path]:
        return sorted((data.sets / "blimp").glob("*.jsonl"))

    def run(self, checkpoint: Checkpoint, data: Data, scorer: Scorer) -> Result:
        items, sizes = [], {}
        for file in self.files(data):
            lines = file.read_text(encoding="utf-8").splitlines()
            chosen = spread(self.pairs, len(lines))
            sizes[file.stem] = len(chosen)
            for index in chosen:
                pair = json.loads(lines[index])
                for sentence in (pair["sentence_good"], pair["sentence_bad"]):
                    items.append(Item([checkpoint.bos], checkpoint.encode(sentence)))
        scores = iter(scorer.score(items, self.name))
        correct = {
            name: [int(next(scores).total > next(scores).total) for _ in range(size)]
            for name, size in sizes.items()
        }
        summary = {"mean": mean_share_interval([(sum(c), len(c)) for c in correct.values()])}
        summary |= {name: share_interval(sum(c), len(c)) for name, c in correct.items()}
        return Result(summary, {"correct": correct})
