"""The order in which training sees a text's tokens."""

from __future__ import annotations

import functools
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from jinja2 import TemplateError
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from attnserve.errors import UserError
from attnserve.evaluation.texts import Tokens, read, read_tokens


def data_tokens(files: Sequence[Path], tokenizer: PreTrainedTokenizerBase) -> Tokens:
    """Return texts and chats one after another, `[num_tokens]`, each ended by the end-of-text
    token.

    A file named `*.jsonl` holds a chat a line, `{"messages": [{"role": ..., "content": ...}]}`,
    which is written as the tokenizer's chat template says. One named `*.npy` holds tokens of this
    tokenizer. Others are UTF-8 text.
    """
    parts = []
    for file in files:
        if file.suffix == ".npy":
            parts.append(_stored(file, len(tokenizer)))
        elif file.suffix == ".jsonl":
            parts += list(_chats(file, tokenizer))
        else:
            parts.append(read_tokens([file], tokenizer))
    return np.concatenate(parts)


def _stored(file: Path, vocabulary: int) -> Tokens:
    """Return a file's tokens.

    Raises:
        UserError: it holds something else.
    """
    try:
        tokens = np.load(file)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(
            f"{file} holds no tokens ({error}): write it by python -m training.tokens"
        ) from None
    if not isinstance(tokens, np.ndarray):
        raise UserError(f"{file} is an archive of arrays, not tokens in a row")
    if tokens.ndim != 1 or tokens.dtype.kind not in "iu" or not len(tokens):
        raise UserError(f"{file} holds {tokens.dtype} {list(tokens.shape)}, not tokens in a row")
    if not 0 <= tokens.min() <= tokens.max() < vocabulary:
        raise UserError(
            f"{file} has tokens {tokens.min()} to {tokens.max()}, and the tokenizer {vocabulary}: "
            "write it again with this model's tokenizer"
        )
    return tokens.astype(np.int64)


def _chats(file: Path, tokenizer: PreTrainedTokenizerBase) -> Iterator[Tokens]:
    for number, line in enumerate(read(file).splitlines(), 1):
        try:
            text = tokenizer.apply_chat_template(json.loads(line)["messages"], tokenize=False)
        except (ValueError, KeyError, TypeError, TemplateError) as error:
            raise UserError(
                f"{file}, line {number}, is no chat of this tokenizer ({error}): a line is "
                '{"messages": [{"role": "user", "content": "..."}, ...]}'
            ) from None
        ids = tokenizer.encode(text, add_special_tokens=False)
        yield np.array([*ids, tokenizer.eos_token_id], dtype=np.int64)


def fingerprint(tokens: Tokens) -> str:
    """Return a hash that tells whether two runs train on the same tokens."""
    return hashlib.sha256(tokens.tobytes()).hexdigest()[:16]


def sequence(tokens: Tokens, start: int, context: int, bos: int) -> tuple[Tokens, Tokens]:
    """Return inputs and targets, both at most `[context]`.

    A model reads the begin-of-text token and predicts `tokens[start : start + context]` from it
    and from one another.
    """
    targets = tokens[start : start + context]
    return np.concatenate(([bos], targets[:-1])), targets


@dataclass(frozen=True)
class Batches:
    """Training batches as a function of the step number, so that a resumed run needs no state.

    Every epoch cuts the text into sequences of `context` tokens at a new offset and shuffles them;
    `bos`, the begin-of-text token, starts each. The order depends on the seed, not on the model.
    """

    tokens: Tokens
    context: int
    batch: int
    bos: int
    seed: int

    def __post_init__(self) -> None:
        if len(self.tokens) < 2 * self.context:
            raise UserError(
                f"{len(self.tokens)} tokens of text are too few for sequences of {self.context}: "
                "name more --data or shorter sequences"
            )

    @property
    def sequences_per_epoch(self) -> int:
        """Return how many sequences fit, whatever the epoch's offset."""
        return len(self.tokens) // self.context - 1

    def __call__(self, step: int) -> tuple[Tensor, Tensor]:
        """Return inputs and targets of a step, both `[batch, context]` int64."""
        starts = map(self._start, range(step * self.batch, (step + 1) * self.batch))
        pairs = [sequence(self.tokens, start, self.context, self.bos) for start in starts]
        inputs, targets = (torch.from_numpy(np.stack(rows)) for rows in zip(*pairs, strict=True))
        return inputs, targets

    def _start(self, number: int) -> int:
        epoch, index = divmod(number, self.sequences_per_epoch)
        offset, order = _epoch(self.seed, epoch, self.context, self.sequences_per_epoch)
        return offset + int(order[index]) * self.context


@functools.lru_cache(maxsize=2)
def _epoch(seed: int, epoch: int, context: int, count: int) -> tuple[int, Tokens]:
    """Return an epoch's offset and the order of its sequences."""
    generator = np.random.default_rng([seed, epoch])
    return int(generator.integers(context)), generator.permutation(count)
