"""Text files as tokens, and the order in which training sees them."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from transformers import PreTrainedTokenizerFast

Tokens = NDArray[np.int64]


def text_file(name: str) -> Path:
    """Return the path of a UTF-8 text file, for argparse.

    Raises:
        argparse.ArgumentTypeError: there is none, or it is something else.
    """
    path = Path(name)
    try:
        path.read_text(encoding="utf-8")
    except OSError as error:
        raise argparse.ArgumentTypeError(f"no file {name} ({error.strerror})") from None
    except UnicodeDecodeError:
        raise argparse.ArgumentTypeError(f"{name} is not UTF-8 text") from None
    return path


def read_tokens(files: Sequence[Path], tokenizer: PreTrainedTokenizerFast) -> Tokens:
    """All files one after another, `[num_tokens]`, each ended by the end-of-text token."""
    parts = []
    for file in files:
        ids = tokenizer.encode(
            file.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False
        )
        parts.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.int64))
    return np.concatenate(parts)


def fingerprint(tokens: Tokens) -> str:
    """A hash that tells whether two runs train on the same tokens."""
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:16]


def sequence(tokens: Tokens, start: int, context: int, bos: int) -> tuple[Tokens, Tokens]:
    """Inputs and targets, both at most `[context]`: a model reads the begin-of-text token and
    predicts `tokens[start : start + context]` from it and from one another."""
    targets = tokens[start : start + context]
    return np.concatenate(([bos], targets[:-1])), targets


@dataclass(frozen=True)
class Batches:
    """Training batches as a function of the step number, so that a resumed run needs no state.

    Every epoch cuts the text into sequences at a new offset and shuffles them. The order depends
    on the seed, not on the model.

    Args:
        tokens: the text.
        context: tokens in a sequence.
        batch: sequences in a batch.
        bos: the begin-of-text token, which starts every sequence.
        seed: of the order.

    Raises:
        ValueError: the text is shorter than two sequences.
    """

    tokens: Tokens
    context: int
    batch: int
    bos: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.tokens) < 2 * self.context:
            raise ValueError(
                f"{len(self.tokens)} tokens of text are too few for sequences of {self.context}"
            )

    @property
    def sequences_per_epoch(self) -> int:
        """Sequences that fit whatever the epoch's offset."""
        return len(self.tokens) // self.context - 1

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Inputs and targets of a step, both `[batch, context]` int64."""
        numbers = range(step * self.batch, (step + 1) * self.batch)
        pairs = [
            sequence(self.tokens, start, self.context, self.bos) for start in self._starts(numbers)
        ]
        inputs, targets = (torch.from_numpy(np.stack(rows)) for rows in zip(*pairs, strict=True))
        return inputs, targets

    def _starts(self, numbers: range) -> Iterator[int]:
        for number in numbers:
            epoch, index = divmod(number, self.sequences_per_epoch)
            offset, order = self._epoch(epoch)
            yield offset + int(order[index]) * self.context

    def _epoch(self, epoch: int) -> tuple[int, Tokens]:
        generator = np.random.default_rng([self.seed, epoch])
        return int(generator.integers(self.context)), generator.permutation(
            self.sequences_per_epoch
        )
