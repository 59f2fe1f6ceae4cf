"""Texts that a model reads: files, or what a checkpoint writes itself, cut into sequences."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

from attnserve.errors import UserError
from attnserve.evaluation.books import Split
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.sampled_text import Use, sampled_text

Tokens = NDArray[np.int64]
CHARACTERS_A_TOKEN = 16  # more than any text needs, so that a window of a text has tokens enough


@dataclass(frozen=True)
class Text:
    """Sequences of a text, each of which a model reads after the begin-of-text token."""

    title: str  # for people
    bos: int  # the begin-of-text token
    sequences: list[list[int]]  # token ids without that token; the last sequence may be shorter

    def __len__(self) -> int:
        return len(self.sequences)

    @property
    def rows(self) -> Tensor:
        """Token ids int64 `[sequences, 1 + length]`, which begin with the begin-of-text token."""
        return torch.tensor([[self.bos, *sequence] for sequence in self.sequences])

    @property
    def tokens(self) -> list[int]:
        """The sequences one after another."""
        return [token for sequence in self.sequences for token in sequence]


def fingerprint(texts: Sequence[Text]) -> str:
    """Return a hash of texts' tokens."""
    sequences = json.dumps([text.sequences for text in texts])
    return hashlib.sha256(sequences.encode()).hexdigest()[:16]


def read(file: Path) -> str:
    """Return a file's text."""
    if not file.is_file():
        raise UserError(f"{file} is not there: name a text file")
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise UserError(f"{file} is no UTF-8 text: convert it, or name another") from None


def read_tokens(files: Sequence[Path], tokenizer: PreTrainedTokenizerFast) -> Tokens:
    """Return all files one after another, `[num_tokens]`, each ended by the end-of-text token."""
    parts = []
    for file in files:
        ids = tokenizer.encode(read(file), add_special_tokens=False, verbose=False)
        parts.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.int64))
    return np.concatenate(parts)


def spread(count: int, of: int, last: bool = True) -> list[int]:
    """Return `count` indices below `of` at even distances, of which `of - 1` is one if `last`; all
    of them if there are no more."""
    count = min(count, of)
    if not last:
        return [i * of // count for i in range(count)]
    return [int(i) for i in np.linspace(0, of - 1, count).round()]


def cut(tokens: Sequence[int], length: int) -> list[list[int]]:
    """Return tokens in sequences of a length, of which the last may be shorter."""
    return [list(tokens[start : start + length]) for start in range(0, len(tokens), length)]


def beginning(checkpoint: Checkpoint, title: str, file: Path, sequences: int | None = None) -> Text:
    """Return a file's text from its beginning, as training sees it: in sequences of the
    checkpoint's context, and at most so many."""
    most = None if sequences is None else sequences * checkpoint.context
    tokens = checkpoint.encode(read(file))[:most]
    return Text(title, checkpoint.bos, cut(tokens, checkpoint.context))


def held_out(checkpoint: Checkpoint, books: Split, sequences: int | None = None) -> list[Text]:
    """Return the validation and the test novel from their beginnings."""
    files = {"validation": books.validation, "test": books.test}
    return [beginning(checkpoint, name, file, sequences) for name, file in files.items()]


def evenly(
    title: str,
    bos: int,
    parts: Sequence[Sequence[int]],
    sequences: int,
    length: int,
    last: bool = True,
) -> Text:
    """Return whole sequences at even distances; all that there are if these are fewer.

    Args:
        title: of the text.
        bos: the begin-of-text token.
        parts: token ids; no sequence has tokens of two of them.
        sequences: how many.
        length: tokens of a sequence.
        last: take the last sequence too.
    """
    whole = [cut(part[: len(part) // length * length], length) for part in parts]
    found = [sequence for part in whole for sequence in part]
    if len(found) < 2:
        raise UserError(
            f"{title} has fewer than two sequences of {length} tokens: give more text, or "
            "lower --length"
        )
    return Text(title, bos, [found[index] for index in spread(sequences, len(found), last)])


def anywhere(
    checkpoint: Checkpoint,
    title: str,
    files: Sequence[Path],
    sequences: int,
    length: int,
    seed: int,
) -> Text:
    """Return sequences of `length` tokens from anywhere in any of the files."""
    generator = np.random.default_rng(seed)
    contents = [read(file) for file in files]
    window = length * CHARACTERS_A_TOKEN
    found = []
    for _ in range(sequences):
        chosen = int(generator.integers(len(contents)))
        content = contents[chosen]
        start = int(generator.integers(max(1, len(content) - window)))
        tokens = checkpoint.encode(content[start : start + window])
        if len(tokens) < length:
            raise UserError(
                f"{files[chosen].name} has fewer than {length} tokens to calibrate on: give "
                "more text, or lower --length"
            )
        # A text that is shorter than the window is all in it: elsewhere in that, then.
        first = int(generator.integers(len(tokens) - length + 1)) if len(content) <= window else 0
        found.append(tokens[first : first + length])
    return Text(title, checkpoint.bos, found)


def written(
    title: str, writer: Checkpoint, use: Use, sequences: int, length: int, seed: int = 0
) -> Text:
    """Return sequences of `length` tokens that a checkpoint writes itself, others for each use."""
    rows = sampled_text(writer.folder, use, sequences, length + 1, seed)
    return Text(title, writer.bos, rows[:, 1:].tolist())
