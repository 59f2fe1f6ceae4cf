"""Tasks of whole sentences: LAMBADA and BLiMP.

lm-eval has both, but it is not in the default install and reads its sets from the network; these
read local files, and give each text's answer for comparisons of two checkpoints in pairs.
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np

from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.intervals import mean_interval, mean_share_interval, share_interval
from attnserve.evaluation.measures import Data, Measure, Result
from attnserve.evaluation.scorers import Item, Scorer
from attnserve.evaluation.texts import spread


@dataclass(frozen=True)
class Lambada(Measure):
    """Accuracy (every token of the word is the likeliest) and perplexity per word, as lm-eval has
    them, on passages at even distances."""

    name: ClassVar[str] = "lambada"
    counts: ClassVar[tuple[str, ...]] = ("passages",)

    passages: int = 1000  # of the 5153 of the test set

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


@dataclass(frozen=True)
class Blimp(Measure):
    """Share of minimal pairs whose grammatical sentence is the more likely one as a whole."""

    name: ClassVar[str] = "blimp"
    counts: ClassVar[tuple[str, ...]] = ("pairs",)

    pairs: int = 200  # of the 1000 of each set, at even distances

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
