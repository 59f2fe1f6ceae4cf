"""Text files as tokens."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerFast

Tokens = NDArray[np.int64]


def read_tokens(files: Sequence[Path], tokenizer: PreTrainedTokenizerFast) -> Tokens:
    """Return all files one after another, `[num_tokens]`, each ended by the end-of-text token."""
    parts = []
    for file in files:
        ids = tokenizer.encode(
            file.read_text(encoding="utf-8"), add_special_tokens=False, verbose=False
        )
        parts.append(np.array([*ids, tokenizer.eos_token_id], dtype=np.int64))
    return np.concatenate(parts)


def sequence(tokens: Tokens, start: int, context: int, bos: int) -> tuple[Tokens, Tokens]:
    """Return inputs and targets, both at most `[context]`.

    A model reads the begin-of-text token and predicts `tokens[start : start + context]` from it
    and from one another.
    """
    targets = tokens[start : start + context]
    return np.concatenate(([bos], targets[:-1])), targets
