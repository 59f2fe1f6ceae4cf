"""Perplexity of texts, and the n-gram models that any model should beat."""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from attnserve.errors import UserError
from attnserve.evaluation.books import split
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.intervals import Estimate, mean_interval
from attnserve.evaluation.measures import Data, Measure, Result
from attnserve.evaluation.ngram import Trigram, Unigram, log_likelihood
from attnserve.evaluation.scorers import Item, Scorer, TransformersScorer
from attnserve.evaluation.texts import Text, beginning, read_tokens

TEXTS = ("validation", "test", "wikitext2")
UNITS = ("token", "word", "byte")


@dataclass(frozen=True)
class Score:
    """A model's likelihood of a text."""

    model: str
    text: str
    log_likelihood: float  # sum over the tokens, natural logarithms
    # tokens, words, bytes: the text's size; words are split by white space, bytes are UTF-8's.
    tokens: int
    words: int
    bytes: int

    @property
    def per_token(self) -> float:
        """Perplexity per token, which only models of the same tokenizer can be compared by."""
        return math.exp(-self.log_likelihood / self.tokens)

    @property
    def per_word(self) -> float:
        return math.exp(-self.log_likelihood / self.words)

    @property
    def per_byte(self) -> float:
        return math.exp(-self.log_likelihood / self.bytes)

    def json(self) -> dict[str, Any]:
        """Return the fields and the three perplexities."""
        per = {f"per_{unit}": getattr(self, f"per_{unit}") for unit in UNITS}
        return dataclasses.asdict(self) | per


def evaluate(
    checkpoint: Checkpoint, texts: Sequence[Text], train: Sequence[Path] = (), quiet: bool = False
) -> list[Score]:
    """Return the scores of a checkpoint, run in float32, and of the two baselines on each text.

    Sequences each start anew, as training sees text. The baselines are counted on the files of
    `train`; without them there are none.
    """
    scorer = TransformersScorer(checkpoint.folder, quiet=quiet)
    tokenizer = checkpoint.tokenizer
    baselines: dict[str, Trigram | Unigram] = {}
    if train:
        counted = read_tokens(train, tokenizer)
        baselines["trigram"] = Trigram(counted, len(tokenizer))
        baselines["unigram"] = Unigram(counted, len(tokenizer))
    scores = []
    for text in texts:
        losses, size = losses_of(checkpoint, scorer, text.title, text)
        scores.append(Score(checkpoint.name, text.title, -sum(losses), *size))
        for name, baseline in baselines.items():
            total = log_likelihood(baseline, np.array(text.tokens), tokenizer.eos_token_id)
            scores.append(Score(name, text.title, total, *size))
    return scores


def table(scores: Sequence[Score]) -> str:
    """Return the scores as a Markdown table."""
    lines = ["| text | model | per token | per word | per byte |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {s.text} | {s.model} | {s.per_token:.2f} | {s.per_word:.1f} | {s.per_byte:.3f} |"
        for s in scores
    ]
    return "\n".join(lines)


@dataclass(frozen=True)
class Perplexity(Measure):
    """Perplexity per token, word and byte of the held-out books, or of the text in their place, and
    of WikiText-2's test text, which only the books make a must: from their beginnings, as training
    sees text, in sequences that each start anew."""

    name: ClassVar[str] = "perplexity"
    counts: ClassVar[tuple[str, ...]] = ("sequences",)

    sequences: int = 128  # of each text, of the training length

    def texts(self, data: Data) -> dict[str, Path]:
        """Return the files by their names among `TEXTS`."""
        found = {"test": data.test}
        if data.text is None:
            found = {"validation": split(data.books).validation} | found
        if data.text is None or data.evaluation is not None:
            found["wikitext2"] = data.sets / "wikitext2_test_raw.txt"
        return found

    def files(self, data: Data) -> list[Path]:
        return list(self.texts(data).values())

    def run(self, checkpoint: Checkpoint, data: Data, scorer: Scorer) -> Result:
        summary: dict[str, Estimate] = {}
        units: dict[str, Any] = {}
        for name, file in self.texts(data).items():
            text = beginning(checkpoint, name, file, self.sequences)
            figures, units[name] = score_text(checkpoint, scorer, name, text)
            summary |= figures
        return Result(summary, units)


def losses_of(
    checkpoint: Checkpoint, scorer: Scorer, name: str, text: Text
) -> tuple[list[float], tuple[int, int, int]]:
    """Return the losses of a text's sequences in nats, and the text's tokens, words and bytes."""
    content = checkpoint.tokenizer.decode(text.tokens)
    if not content.split():
        raise UserError(f"{text.title} has no words: name another text")
    items = [Item([text.bos], sequence) for sequence in text.sequences]
    found = scorer.score(items, f"{Perplexity.name}, {name}")
    sizes = (len(text.tokens), len(content.split()), len(content.encode()))
    return [-scored.total for scored in found], sizes


def score_text(
    checkpoint: Checkpoint, scorer: Scorer, name: str, text: Text
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """Return perplexity per token, word and byte of a text with its loss, and the losses of its
    sequences (nats per token) with the text's size; `name` begins the figures' names."""
    losses, sizes = losses_of(checkpoint, scorer, name, text)
    # The last sequence may be short: its loss counts for as many tokens as it has.
    loss = mean_interval([value * len(text) / sizes[0] for value in losses])
    summary = {f"{name} loss": loss}
    for unit, count in zip(UNITS, sizes, strict=True):
        nats = Estimate(*(value * sizes[0] / count for value in loss))
        summary[f"{name} per {unit}"] = nats.exp()
    pairs = zip(losses, text.sequences, strict=True)
    each = [round(value / len(sequence), 5) for value, sequence in pairs]
    units = dict(zip(("tokens", "words", "bytes"), sizes, strict=True))
    return summary, units | {"sequence_losses": each}
