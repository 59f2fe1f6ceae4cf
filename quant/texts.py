"""What is measured and calibrated on: the user's text, the recipe's books, or sampled text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attnserve.errors import UserError
from attnserve.evaluation.books import split
from attnserve.evaluation.measures import Data
from attnserve.evaluation.tasks import Blimp, Lambada, spread
from attnserve.sampled_text import Use, sampled_text
from quant.samples import Subject

CHARACTERS_A_TOKEN = 16
"""More than any text needs, so that a piece is long enough."""
WIKITEXT = "wikitext2_test_raw.txt"
SAMPLED = "text sampled from "
BOOK = "test book"
"""The title of *Great Expectations*, which is no training text of the reference checkpoints."""


@dataclass(frozen=True)
class Sources:
    """Where text comes from; a checkpoint writes what is not given.

    Args:
        text: files to measure on.
        calibration_text: files to calibrate on.
        books: a folder for both, as `attnserve.evaluation.books.split` splits it.
        sets: a folder with WikiText-2, BLiMP and LAMBADA, which are measured only from there.
        writer: the checkpoint that writes.

    Raises:
        UserError: they contradict each other.
    """

    text: tuple[Path, ...] = ()
    calibration_text: tuple[Path, ...] = ()
    books: Path | None = None
    sets: Path | None = None
    writer: Path | None = None

    def __post_init__(self) -> None:
        if self.books is not None and (self.text or self.calibration_text):
            raise UserError("--books gives both texts: leave out --text and --calibration-text")
        if twice := {f.resolve() for f in self.text} & {f.resolve() for f in self.calibration_text}:
            raise UserError(
                f"{min(twice)} would be measured on after it was calibrated on: give another text "
                "to calibrate on, or leave out --calibration-text"
            )

    @property
    def sampled(self) -> bool:
        """Whether a checkpoint writes anything."""
        return self.books is None and not (self.text and self.calibration_text)


@dataclass(frozen=True)
class Text:
    """Pieces of a text, each of which a model reads after the begin-of-text token.

    Args:
        title: for people.
        pieces: token ids without that token.
    """

    title: str
    pieces: list[list[int]]

    def rows(self, begin: int) -> Tensor:
        """Return token ids int64 `[pieces, tokens]`, each piece after the begin-of-text token."""
        return torch.tensor([[begin, *piece] for piece in self.pieces])


def measured_texts(sources: Sources, subject: Subject, sequences: int) -> dict[str, Text]:
    """Return the texts whose perplexity and divergence are measured; `test` is the main one.

    Raises:
        UserError, FileNotFoundError: a text is missing or too short.
    """
    length = subject.context
    if sources.books is not None:
        books = split(sources.books)
        found = {
            "validation": Text("validation book", _first(books.validation, subject, sequences)),
            "test": Text(BOOK, _first(books.test, subject, sequences)),
        }
    else:
        found = {"test": _measured(sources, subject, sequences, length)}
    if sources.sets is not None:
        file = sources.sets / WIKITEXT
        found["wikitext2"] = Text("WikiText-2", _first(file, subject, sequences))
    return found


def held_out_texts(sources: Sources, subject: Subject, sequences: int) -> tuple[Text, Text]:
    """Return a text to choose by, and one to measure the choice on, in pieces of one token less
    than the context.

    The text to choose by is the validation book, else what calibration texts are, at other places.

    Raises:
        UserError, FileNotFoundError: a text is missing or too short.
    """
    length = subject.context - 1
    if sources.books is not None:
        books = split(sources.books)
        return (
            Text("validation book", _evenly([books.validation], subject, sequences, length)),
            Text(BOOK, _evenly([books.test], subject, sequences, length)),
        )
    if sources.calibration_text:
        pieces = _evenly(sources.calibration_text, subject, sequences, length)
        choose = Text(_names(sources.calibration_text), pieces)
    else:
        choose = _sampled(sources, subject, "validation", sequences, length)
    return choose, _measured(sources, subject, sequences, length)


def calibration_text(sources: Sources, subject: Subject, sequences: int, seed: int) -> Text:
    """Return what calibrated schemes and static scales are calibrated on, in pieces of one token
    less than the context. Text that is measured on is never read.

    Raises:
        UserError, FileNotFoundError: a text is missing or too short.
    """
    length = subject.context - 1
    if sources.books is not None:
        files = split(sources.books).train
        return Text("training books", _anywhere(files, subject, sequences, length, seed))
    if sources.calibration_text:
        files = list(sources.calibration_text)
        return Text(_names(files), _anywhere(files, subject, sequences, length, seed))
    return _sampled(sources, subject, "calibration", sequences, length, seed)


def explained(measured: str, calibration: str) -> str:
    """Return the sentences that say for people what texts were, from their titles."""
    found = f"Measured on: {measured}. Calibrated on: {calibration}."
    if measured.startswith(SAMPLED):
        found += (
            f" Perplexity on it is the entropy of {measured.removeprefix(SAMPLED)}'s own sampling, "
            "not that of a language; KL divergence and agreement mean what they always do."
        )
    return found


def fingerprint(texts: Sequence[Text]) -> str:
    """Return a hash of texts' tokens."""
    pieces = json.dumps([text.pieces for text in texts])
    return hashlib.sha256(pieces.encode()).hexdigest()[:16]


def set_files(sets: Path) -> list[Path]:
    """Return the files of the evaluation sets.

    Raises:
        UserError: one is not there.
    """
    data = Data(sets, sets)  # they have no books
    files = [sets / WIKITEXT, *Blimp().files(data), *Lambada().files(data)]
    for file in files:
        if not file.is_file():
            raise UserError(f"{file} is not there: name its folder with --eval, or leave it out")
    if len(files) < 3:
        raise UserError(
            f"{sets} has no blimp/*.jsonl: name its folder with --eval, or leave it out"
        )
    return files


def _measured(sources: Sources, subject: Subject, sequences: int, length: int) -> Text:
    """The main text, where there are no books."""
    if sources.text:
        return Text(_names(sources.text), _evenly(sources.text, subject, sequences, length))
    return _sampled(sources, subject, "evaluation", sequences, length)


def _sampled(
    sources: Sources, subject: Subject, use: Use, sequences: int, length: int, seed: int = 0
) -> Text:
    """Pieces that a checkpoint writes. Their beginnings are the same for every reader, also for
    one whose context is shorter."""
    writer = Subject(sources.writer or subject.folder, subject.length)
    rows = sampled_text(writer.folder, use, sequences, writer.context + 1, seed)
    return Text(SAMPLED + writer.name, rows[:, 1 : length + 1].tolist())


def _names(files: Sequence[Path]) -> str:
    """The title of a user's text."""
    if len(files) > 3:
        return f"{files[0].name} and {len(files) - 1} more"
    return ", ".join(file.name for file in files)


def _read(file: Path) -> str:
    if not file.is_file():
        raise UserError(f"{file} is not there: name a text file")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{file} is no UTF-8 text: convert it, or name another") from None


def _first(file: Path, subject: Subject, sequences: int) -> list[list[int]]:
    """A book from its beginning, as training sees text; the last piece may be short."""
    tokens = subject.encode(_read(file))[: sequences * subject.context]
    return [tokens[i : i + subject.context] for i in range(0, len(tokens), subject.context)]


def _evenly(
    files: Sequence[Path], subject: Subject, sequences: int, length: int
) -> list[list[int]]:
    """Pieces at even distances, two at least, so that there is an interval."""
    pieces = []
    for file in files:
        tokens = subject.encode(_read(file))
        whole = range(0, len(tokens) - length + 1, length)
        pieces += [tokens[start : start + length] for start in whole]
    if len(pieces) < 2:
        raise UserError(
            f"{_names(files)} has fewer than two sequences of {length} tokens: give more text, or "
            "lower --length"
        )
    return [pieces[index] for index in spread(sequences, len(pieces))]


def _anywhere(
    files: Sequence[Path], subject: Subject, sequences: int, length: int, seed: int
) -> list[list[int]]:
    """Pieces from anywhere in any of the files."""
    generator = np.random.default_rng(seed)
    texts = [_read(file) for file in files]
    window = length * CHARACTERS_A_TOKEN
    pieces = []
    for _ in range(sequences):
        chosen = int(generator.integers(len(texts)))
        text = texts[chosen]
        start = int(generator.integers(max(1, len(text) - window)))
        tokens = subject.encode(text[start : start + window])
        if len(tokens) < length:
            raise UserError(
                f"{files[chosen].name} has fewer than {length} tokens to calibrate on: give more "
                "text, or lower --length"
            )
        # A text that is shorter than the window is all in it: elsewhere in that, then.
        first = int(generator.integers(len(tokens) - length + 1)) if len(text) <= window else 0
        pieces.append(tokens[first : first + length])
    return pieces
