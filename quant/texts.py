"""What calibrated schemes and static scales are calibrated on: pieces of the training books."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from training.analyze.measure import Checkpoint
from training.books import split

CHARACTERS_A_TOKEN = 16
"""More than any text needs, so that a piece is long enough."""


def calibration(checkpoint: Checkpoint, books: Path, sequences: int, seed: int) -> Tensor:
    """Token ids `[sequences, length]` of the checkpoint's context length, each from another place
    of a training book, after the begin-of-text token. Held-out books are never read.

    Raises:
        ValueError: the books are too short.
    """
    generator = np.random.default_rng(seed)
    texts = [file.read_text(encoding="utf-8") for file in split(books).train]
    length = checkpoint.context - 1
    rows = []
    for _ in range(sequences):
        text = texts[generator.integers(len(texts))]
        start = int(generator.integers(max(1, len(text) - length * CHARACTERS_A_TOKEN)))
        tokens = checkpoint.encode(text[start : start + length * CHARACTERS_A_TOKEN])[:length]
        if len(tokens) < length:
            raise ValueError(
                f"a training book has fewer than {length} tokens to calibrate on: lower --length"
            )
        rows.append([checkpoint.bos, *tokens])
    return torch.tensor(rows)
