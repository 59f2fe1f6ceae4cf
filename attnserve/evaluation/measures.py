"""What a measure is, and the texts that it reads."""

import dataclasses
from abc import ABC, abstractmethod
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Self

from attnserve.errors import UserError
from attnserve.evaluation.arguments import SETS
from attnserve.evaluation.books import split
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.intervals import Estimate
from attnserve.evaluation.scorers import Scorer


@dataclass(frozen=True)
class Data:
    """Folders of text."""

    # What `attnserve.evaluation.books.split` splits; None: the fetched novels.
    books: Path | None = None
    evaluation: Path | None = None  # the sets that `SETS` names; None: there are none
    text: Path | None = None  # a text to measure on in place of the novels

    @property
    def test(self) -> Path:
        """Return the text that is measured on: the test novel, or the one in its place."""
        return self.text or split(self.books).test

    @property
    def sets(self) -> Path:
        """Return the folder of the evaluation sets."""
        if self.evaluation is None:
            raise UserError(
                f"name the folder of the evaluation sets ({SETS}) with --eval, or leave out what "
                "needs them"
            )
        return self.evaluation


@dataclass(frozen=True)
class Result:
    """The figures of one measure."""

    summary: dict[str, Estimate]  # figures for the table
    units: dict[str, Any]  # values of each text, for comparisons in pairs: lists and numbers


@dataclass(frozen=True)
class Measure(ABC):
    """One thing to measure. The fields of a subclass are its settings; a result is good for the
    settings, texts and checkpoint that it was measured with.

    Class attributes:
        name: of the measure, and of its results' files.
        counts: the settings that are sample sizes, which `--limit` caps.
        needs_scores: it asks a `Scorer`, so that every engine can do it; else it reads a
            transformers model's inside.
        uses_length: it takes the model beyond its training length, so that RoPE's theta matters.
    """

    name: ClassVar[str]
    counts: ClassVar[tuple[str, ...]]
    needs_scores: ClassVar[bool] = True
    uses_length: ClassVar[bool] = False

    @abstractmethod
    def files(self, data: Data) -> list[Path]:
        """Return the texts that it reads."""

    @abstractmethod
    def run(self, checkpoint: Checkpoint, data: Data, scorer: Scorer) -> Result:
        """Measure."""

    def longest(self, checkpoint: Checkpoint) -> int:
        """Return the tokens of its longest item, the begin-of-text token included."""
        return checkpoint.context + 1

    def limited(self, limit: int | None) -> Self:
        """Return the same with every sample size at most `limit`."""
        if limit is None:
            return self
        smaller: dict[str, Any] = {name: min(limit, getattr(self, name)) for name in self.counts}
        return dataclasses.replace(self, **smaller)
