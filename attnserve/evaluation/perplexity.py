"""Perplexity of texts, and the n-gram models that any model should beat."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from attnserve.errors import UserError
from attnserve.evaluation.books import Split, split
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.intervals import Estimate, mean_interval
from attnserve.evaluation.measures import Data, Measure, Result
from attnserve.evaluation.ngram import Trigram, Unigram, log_likelihood
from attnserve.evaluation.scorers import Item, Scored, Scorer, TransformersScorer
from attnserve.evaluation.tokens import Tokens, read_tokens
from attnserve.sampled_text import sampled_text

TEXTS = ("validation", "test", "wikitext2")
UNITS = ("token", "word", "byte")
OWN_SEQUENCES, OWN_LENGTH = 16, 512
"""Sequences that a checkpoint writes where no text is at hand, and the tokens of each."""


@dataclass(frozen=True)
class Score:
    """A model's likelihood of a text.

    Attributes:
        model, text: names for the table.
        log_likelihood: sum over the tokens, natural logarithms.
        tokens, words, bytes: the text's size; words are split by white space, bytes are UTF-8's.
    """

    model: str
    text: str
    log_likelihood: float
    tokens: int
    words: int
    bytes: int

    @property
    def per_token(self) -> float:
        """Perplexity per token, which only models of the same tokenizer can be compared by."""
        return math.exp(-self.log_likelihood / self.tokens)

    @property
    def per_word(self) -> float:
        """Perplexity per word."""
        return math.exp(-self.log_likelihood / self.words)

    @property
    def per_byte(self) -> float:
        """Perplexity per byte."""
        return math.exp(-self.log_likelihood / self.bytes)

    def json(self) -> dict[str, Any]:
        """Return the fields and the three perplexities."""
        per = {f"per_{unit}": getattr(self, f"per_{unit}") for unit in UNITS}
        return dataclasses.asdict(self) | per


@dataclass(frozen=True)
class Text:
    """A text that a checkpoint reads.

    Attributes:
        name: for the table.
        tokens: `[num_tokens]`.
        content: the same as characters.
        context: tokens of a sequence.
    """

    name: str
    tokens: Tokens
    content: str
    context: int


def file_text(checkpoint: Checkpoint, name: str, file: Path, sequences: int | None = None) -> Text:
    """Return a file's text, or its first sequences of the training length.

    Raises:
        UserError: it is empty.
    """
    tokens = read_tokens([file], checkpoint.tokenizer)[:-1]
    content = file.read_text(encoding="utf-8")
    if not content.split():
        raise UserError(f"{file} has no words")
    most = len(tokens) if sequences is None else sequences * checkpoint.context
    if len(tokens) > most:
        tokens = tokens[:most]
        content = checkpoint.tokenizer.decode(tokens)
    return Text(name, tokens, content, checkpoint.context)


def held_out(checkpoint: Checkpoint, books: Split, sequences: int | None = None) -> list[Text]:
    """Return the validation and the test novel, or their first sequences."""
    files = {"validation": books.validation, "test": books.test}
    return [file_text(checkpoint, name, file, sequences) for name, file in files.items()]


def own_text(checkpoint: Checkpoint, sequences: int | None = None) -> Text:
    """Return text that the checkpoint writes itself."""
    context = min(checkpoint.context, OWN_LENGTH)
    count = min(sequences or OWN_SEQUENCES, OWN_SEQUENCES)
    rows = sampled_text(checkpoint.folder, "evaluation", count, context + 1)
    tokens = rows[:, 1:].flatten().numpy()
    return Text("own text", tokens, checkpoint.tokenizer.decode(tokens), context)


def evaluate(
    checkpoint: Checkpoint, texts: Sequence[Text], train: Sequence[Path] = (), quiet: bool = False
) -> list[Score]:
    """Return the scores of a checkpoint, run in float32, and of the two baselines on each text.

    Args:
        checkpoint: what is measured.
        texts: what it reads, as training sees text: in sequences that each start anew.
        train: the files that the baselines are counted on; without them there are none.
        quiet: no progress bars.
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
        size = (len(text.tokens), len(text.content.split()), len(text.content.encode()))
        found = score_pieces(checkpoint, scorer, text.name, pieces(text.tokens, text.context))
        total = sum(scored.total for scored in found)
        scores.append(Score(checkpoint.name, text.name, total, *size))
        for name, baseline in baselines.items():
            total = log_likelihood(baseline, text.tokens, tokenizer.eos_token_id)
            scores.append(Score(name, text.name, total, *size))
    return scores


def table(scores: Sequence[Score]) -> str:
    """Return the scores as a Markdown table."""
    lines = ["| text | model | per token | per word | per byte |", "|---|---|---:|---:|---:|"]
    lines += [
        f"| {s.text} | {s.model} | {s.per_token:.2f} | {s.per_word:.1f} | {s.per_byte:.3f} |"
        for s in scores
    ]
    return "\n".join(lines)


def pieces(tokens: Tokens, length: int) -> list[list[int]]:
    """Return tokens cut into pieces, of which the last may be shorter."""
    return [tokens[start : start + length].tolist() for start in range(0, len(tokens), length)]


def score_pieces(
    checkpoint: Checkpoint, scorer: Scorer, name: str, pieces: Sequence[list[int]]
) -> list[Scored]:
    """Return the scores of a text's pieces, each of which is read after the begin-of-text token
    alone."""
    items = [Item([checkpoint.bos], piece) for piece in pieces]
    return scorer.score(items, f"{Perplexity.name}, {name}")


@dataclass(frozen=True)
class Perplexity(Measure):
    """Perplexity per token, word and byte of the held-out books and of WikiText-2's test text, from
    their beginnings, as training sees text: in sequences that each start anew.

    Args:
        sequences: of each text, of the training length.
    """

    name: ClassVar[str] = "perplexity"
    counts: ClassVar[tuple[str, ...]] = ("sequences",)

    sequences: int = 128

    def files(self, data: Data) -> list[Path]:
        """Return the two held-out books and WikiText-2's test text."""
        books = split(data.books)
        return [books.validation, books.test, data.sets / "wikitext2_test_raw.txt"]

    def run(self, checkpoint: Checkpoint, data: Data, scorer: Scorer) -> Result:
        """Measure."""
        summary: dict[str, Estimate] = {}
        units: dict[str, Any] = {}
        for name, file in zip(TEXTS, self.files(data), strict=True):
            tokens = read_tokens([file], checkpoint.tokenizer)[:-1]
            cut = pieces(tokens[: self.sequences * checkpoint.context], checkpoint.context)
            figures, units[name] = score_text(checkpoint, scorer, name, cut)
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
    text = checkpoint.tokenizer.decode([token for piece in pieces for token in piece])
    sizes = (sum(map(len, pieces)), len(text.split()), len(text.encode()))
    losses = [-scored.total for scored in score_pieces(checkpoint, scorer, name, pieces)]
    # The last piece may be short: its loss counts for as many tokens as it has.
    loss = mean_interval([value * len(pieces) / sizes[0] for value in losses])
    summary = {f"{name} loss": loss}
    for unit, count in zip(UNITS, sizes, strict=True):
        nats = Estimate(*(value * sizes[0] / count for value in loss))
        summary[f"{name} per {unit}"] = nats.exp()
    each = [round(value / len(piece), 5) for value, piece in zip(losses, pieces, strict=True)]
    units = dict(zip(("tokens", "words", "bytes"), sizes, strict=True))
    return summary, units | {"sequence_losses": each}
