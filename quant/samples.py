"""How much is measured, and of which checkpoint."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from attnserve.evaluation.checkpoint import Checkpoint


@dataclass(frozen=True)
class Samples:
    """How much is measured.

    Args:
        sequences: of each text, for perplexity and divergence.
        length: tokens of a sequence; at most the training length is used.
        pairs: of each BLiMP set.
        passages: of LAMBADA.
        calibration: sequences of text for GPTQ and static scales.
        seed: of the calibration text.
    """

    sequences: int
    length: int
    pairs: int
    passages: int
    calibration: int
    seed: int = 0


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
