"""The text that budgets are searched, judged and compared on."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from attnserve.errors import UserError
from attnserve.evaluation.books import Split
from attnserve.evaluation.checkpoint import Checkpoint, digest
from attnserve.evaluation.tokens import Tokens, read_tokens, sequence
from attnserve.sampled_text import Use, sampled_text


@dataclass(frozen=True)
class Texts:
    """Sequences of a text, each of which starts with the begin-of-text token.

    Attributes:
        name: for the names of files.
        about: what tells the sequences from others, with their length and number.
        inputs, targets: `[sequences, length]`.
    """

    name: str
    about: dict[str, str | int]
    inputs: Tensor
    targets: Tensor

    def __len__(self) -> int:
        return len(self.inputs)


class Counts(NamedTuple):
    """Numbers of sequences, and the tokens of each."""

    search: int
    judge: int
    test: int
    length: int


@dataclass(frozen=True)
class Parts:
    """Texts by what they are for.

    Attributes:
        search: by which layers to shrink are chosen.
        judge: by which a target counts as reached.
        test: for the table.
        kind: the two held-out novels, a user's files, or what the checkpoint writes itself.
        source: the same for people.
        digests: a hash of each text.
    """

    search: Texts
    judge: Texts
    test: Texts
    kind: Literal["novels", "files", "own"]
    source: str
    digests: dict[str, str]


def evenly(
    tokens: Tokens, bos: int, length: int, sequences: int, name: str, text_digest: str
) -> Texts:
    """Return sequences that are spread evenly over a text.

    Args:
        tokens: `[num_tokens]`.
        bos: the begin-of-text token.
        length: tokens of a sequence.
        sequences: how many; all that there are if these are fewer.
        name, text_digest: of the text.

    Raises:
        UserError: the text is shorter than two sequences.
    """
    there = len(tokens) // length
    if there < 2:
        raise UserError(f"{name} has {len(tokens)} tokens, fewer than two sequences of {length}")
    places = sorted({i * there // sequences for i in range(sequences)})
    pairs = [sequence(tokens, place * length, length, bos) for place in places]
    inputs, targets = (torch.from_numpy(np.stack(part)) for part in zip(*pairs, strict=True))
    about: dict[str, str | int] = {"text": text_digest, "length": length, "sequences": sequences}
    return Texts(name, about, inputs, targets)


def of_file(checkpoint: Checkpoint, file: Path, length: int, sequences: int) -> Texts:
    """Return sequences of a file."""
    tokens = read_tokens([file], checkpoint.tokenizer)[:-1]
    return evenly(tokens, checkpoint.bos, length, sequences, file.stem, digest(file))


def of_novels(checkpoint: Checkpoint, books: Split, counts: Counts) -> Parts:
    """Return sequences of the two held-out novels."""
    files = (books.validation, books.test)
    return Parts(
        of_file(checkpoint, books.validation, counts.length, counts.search),
        of_file(checkpoint, books.validation, counts.length, counts.judge),
        of_file(checkpoint, books.test, counts.length, counts.test),
        "novels",
        " and ".join(file.name for file in files),
        {file.name: digest(file) for file in files},
    )


def of_users_text(checkpoint: Checkpoint, files: Sequence[Path], counts: Counts) -> Parts:
    """Return sequences of the files' first half for search and judgement, of their second half for
    the test."""
    tokens = read_tokens(files, checkpoint.tokenizer)[:-1]
    whole = digest(*files)

    def part(half: str, sequences: int) -> Texts:
        middle = len(tokens) // 2
        own = tokens[:middle] if half == "first" else tokens[middle:]
        name = f"{half} half of {files[0].name}"
        text_digest = f"{whole} {half}"
        return evenly(own, checkpoint.bos, counts.length, sequences, name, text_digest)

    return Parts(
        part("first", counts.search),
        part("first", counts.judge),
        part("second", counts.test),
        "files",
        ", ".join(file.name for file in files),
        {file.name: digest(file) for file in files},
    )


def of_itself(checkpoint: Checkpoint, counts: Counts) -> Parts:
    """Return sequences that the checkpoint writes, others for each use."""

    def part(use: Use, sequences: int) -> Texts:
        rows = sampled_text(checkpoint.folder, use, sequences, counts.length + 1)
        about: dict[str, str | int] = {
            "text": hashlib.sha256(rows.numpy().tobytes()).hexdigest()[:16],
            "length": counts.length,
            "sequences": sequences,
        }
        return Texts(f"sampled for {use}", about, rows[:, :-1], rows[:, 1:])

    parts = (
        part("calibration", counts.search),
        part("validation", counts.judge),
        part("evaluation", counts.test),
    )
    digests = {text.name: str(text.about["text"]) for text in parts}
    return Parts(*parts, "own", f"what {checkpoint.name} writes itself", digests)
