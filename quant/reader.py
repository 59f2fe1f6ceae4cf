"""A checkpoint that reads pieces of texts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from attnserve.errors import UserError
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.tasks import spread

CHARACTERS_A_TOKEN = 16
"""More than any text needs, so that a piece is long enough."""


@dataclass(frozen=True)
class Passages:
    """Pieces of a text, each of which a model reads after the begin-of-text token.

    Args:
        title: for people.
        begin: the begin-of-text token.
        pieces: token ids without that token.
    """

    title: str
    begin: int
    pieces: list[list[int]]

    @property
    def rows(self) -> Tensor:
        """Token ids int64 `[pieces, tokens]`, each piece after the begin-of-text token."""
        return torch.tensor([[self.begin, *piece] for piece in self.pieces])


class Reader(Checkpoint):
    """A checkpoint that reads sequences of limited length, and tokenizes each text only once.

    Args:
        folder: a Hugging Face folder.
        length: tokens of a sequence; `context` is that, or the training length if that is less.
    """

    def __init__(self, folder: Path, length: int) -> None:
        super().__init__(folder)
        self.length = length
        self.context = min(length, self.context)
        self._encoded: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Return token ids without special tokens."""
        if text not in self._encoded:
            self._encoded[text] = super().encode(text)
        return self._encoded[text]

    def beginning(self, title: str, file: Path, sequences: int) -> Passages:
        """Return a text from its beginning, as training sees it, in pieces of the context; the last
        one may be short."""
        tokens = self.encode(read(file))[: sequences * self.context]
        starts = range(0, len(tokens), self.context)
        return Passages(title, self.bos, [tokens[i : i + self.context] for i in starts])

    def evenly(self, title: str, files: Sequence[Path], sequences: int, length: int) -> Passages:
        """Return pieces of `length` tokens at even distances.

        Raises:
            UserError: there are not even two, which an interval needs.
        """
        pieces = []
        for file in files:
            tokens = self.encode(read(file))
            whole = range(0, len(tokens) - length + 1, length)
            pieces += [tokens[start : start + length] for start in whole]
        if len(pieces) < 2:
            raise UserError(
                f"{title} has fewer than two sequences of {length} tokens: give more text, or "
                "lower --length"
            )
        chosen = [pieces[index] for index in spread(sequences, len(pieces))]
        return Passages(title, self.bos, chosen)

    def anywhere(
        self, title: str, files: Sequence[Path], sequences: int, length: int, seed: int
    ) -> Passages:
        """Return pieces of `length` tokens from anywhere in any of the files.

        Raises:
            UserError: a file is too short.
        """
        generator = np.random.default_rng(seed)
        texts = [read(file) for file in files]
        window = length * CHARACTERS_A_TOKEN
        pieces = []
        for _ in range(sequences):
            chosen = int(generator.integers(len(texts)))
            text = texts[chosen]
            start = int(generator.integers(max(1, len(text) - window)))
            tokens = self.encode(text[start : start + window])
            if len(tokens) < length:
                raise UserError(
                    f"{files[chosen].name} has fewer than {length} tokens to calibrate on: give "
                    "more text, or lower --length"
                )
            # A text that is shorter than the window is all in it: elsewhere in that, then.
            first = int(generator.integers(len(tokens) - length + 1)) if len(text) <= window else 0
            pieces.append(tokens[first : first + length])
        return Passages(title, self.bos, pieces)


def read(file: Path) -> str:
    """Return a file's text.

    Raises:
        UserError: it is not there, or no text.
    """
    if not file.is_file():
        raise UserError(f"{file} is not there: name a text file")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{file} is no UTF-8 text: convert it, or name another") from None
