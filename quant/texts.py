"""What is measured and calibrated on: the user's text, the recipe's books, or sampled text."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

from attnserve.errors import UserError
from attnserve.evaluation.books import split
from attnserve.evaluation.checkpoint import Checkpoint, digest
from attnserve.evaluation.measures import Data
from attnserve.evaluation.tasks import Blimp, Lambada
from attnserve.evaluation.texts import Text, anywhere, beginning, evenly, fingerprint, read, written
from attnserve.files import CHECKOUT
from attnserve.sampled_text import Use, writers
from quant.config import Samples

CHECKPOINTS = CHECKOUT / "checkpoints"
WIKITEXT = "wikitext2_test_raw.txt"
SAMPLED = "text sampled from "


@dataclass(frozen=True)
class Sources:
    """Where text comes from; a checkpoint writes what is not given."""

    text: Sequence[Path] = ()  # files to measure on
    calibration_text: Sequence[Path] = ()  # files to calibrate on
    books: Path | None = None  # a folder for both, as `attnserve.evaluation.books.split` splits it
    # A folder with WikiText-2, BLiMP and LAMBADA, which are measured only from there.
    sets: Path | None = None
    writer: Path | None = None  # the checkpoint that writes; None: the one that reads

    def __post_init__(self) -> None:
        if self.books is not None and (self.text or self.calibration_text):
            raise UserError("--books gives both texts: leave out --text and --calibration-text")
        if twice := {f.resolve() for f in self.text} & {f.resolve() for f in self.calibration_text}:
            raise UserError(
                f"{min(twice)} would be measured on after it was calibrated on: give another text "
                "to calibrate on, or leave out --calibration-text"
            )

    def files(self, use: Use) -> tuple[str, Sequence[Path]]:
        """Return title and files of a text; no files: a checkpoint writes it.

        Validation is by what is chosen: the validation book, else what is calibrated on, at other
        places.
        """
        if self.books is not None:
            books = split(self.books)
            found: dict[Use, tuple[str, Sequence[Path]]] = {
                "calibration": ("training books", books.train),
                "validation": ("validation book", [books.validation]),
                "evaluation": ("test book", [books.test]),
            }
            return found[use]
        files = self.text if use == "evaluation" else self.calibration_text
        if len(files) > 3:
            return f"{files[0].name} and {len(files) - 1} more", files
        return ", ".join(file.name for file in files), files

    def for_checkpoints(self, folders: Sequence[Path]) -> dict[Path, Self]:
        """Return the sources of each checkpoint: who writes depends on all of them.

        Where a bundled checkpoint is among them, all bundled ones count, so that it reads the same
        text alone as beside the others.
        """
        if self.books is not None or (self.text and self.calibration_text):
            if self.writer is not None:
                raise UserError("--text-from: all text is given, none is written: leave it out")
            return dict.fromkeys(folders, self)
        named, bundled = {folder.resolve() for folder in folders}, bundled_checkpoints()
        others = [folder for folder in bundled if folder not in named]
        found = writers([*folders, *(others if named & set(bundled) else ())], self.writer)
        return {folder: replace(self, writer=found[folder]) for folder in folders}


def bundled_checkpoints() -> list[Path]:
    """Return the checkpoints that come with a checkout of the project; none without one."""
    return sorted(file.parent for file in CHECKPOINTS.glob("*/config.json"))


@dataclass(frozen=True)
class SweepTexts:
    """What a checkpoint is measured and calibrated on."""

    measured: dict[str, Text]  # by name; `test` is the main one
    calibration: Text  # for calibrated schemes, static scales and outliers
    sets: Path | None  # the folder of BLiMP and LAMBADA; None: they are not measured
    key: str  # a hash of all of it

    @property
    def titles(self) -> dict[str, str]:
        """The titles, as results keep them."""
        return {"measured": self.measured["test"].title, "calibration": self.calibration.title}


def sweep_texts(sources: Sources, checkpoint: Checkpoint, samples: Samples) -> SweepTexts:
    """Return all texts for a checkpoint, sampled where none is given."""
    sets = [] if sources.sets is None else set_files(sources.sets)
    measured = measured_texts(sources, checkpoint, samples.sequences)
    calibration = calibration_text(sources, checkpoint, samples.calibration, samples.seed)
    if sources.books is not None and sets:
        # As the committed results have it.
        books = split(sources.books)
        key = digest(*books.train, *sorted({books.validation, books.test, *sets}))
    else:
        key = f"{fingerprint([*measured.values(), calibration])}{digest(*sets) if sets else ''}"
    return SweepTexts(measured, calibration, sources.sets, key)


def measured_texts(sources: Sources, checkpoint: Checkpoint, sequences: int) -> dict[str, Text]:
    """Return the texts whose perplexity and divergence are measured; `test` is the main one."""
    found = {}
    if sources.books is not None:
        uses: dict[str, Use] = {"validation": "validation", "test": "evaluation"}
        for name, use in uses.items():
            title, (file,) = sources.files(use)
            found[name] = beginning(checkpoint, title, file, sequences)
    else:
        found["test"] = text_for("evaluation", sources, checkpoint, sequences, checkpoint.context)
    if sources.sets is not None:
        found["wikitext2"] = beginning(checkpoint, "WikiText-2", sources.sets / WIKITEXT, sequences)
    return found


def calibration_text(sources: Sources, checkpoint: Checkpoint, sequences: int, seed: int) -> Text:
    """Return what calibrated schemes and static scales are calibrated on, in sequences of one token
    less than the context. Text that is measured on is never read."""
    return text_for("calibration", sources, checkpoint, sequences, checkpoint.context - 1, seed)


def text_for(
    use: Use, sources: Sources, checkpoint: Checkpoint, sequences: int, length: int, seed: int = 0
) -> Text:
    """Return sequences of `length` tokens for a use: from anywhere to calibrate on, else at even
    distances.

    Where a checkpoint writes them, their beginnings are the same for every reader, also for one
    whose context is shorter.
    """
    title, files = sources.files(use)
    if files and use == "calibration":
        return anywhere(checkpoint, title, files, sequences, length, seed)
    if files:
        parts = [checkpoint.encode(read(file)) for file in files]
        return evenly(title, checkpoint.bos, parts, sequences, length)
    writer = Checkpoint(sources.writer or checkpoint.folder, longest=checkpoint.longest)
    text = written(SAMPLED + writer.name, writer, use, sequences, writer.context, seed)
    return replace(text, sequences=[sequence[:length] for sequence in text.sequences])


def explained(measured: str, calibration: str) -> str:
    """Return the sentences that say for people what texts were, from their titles."""
    found = f"Measured on: {measured}. Calibrated on: {calibration}."
    if measured.startswith(SAMPLED):
        found += (
            f" Perplexity on it is the entropy of {measured.removeprefix(SAMPLED)}'s own sampling, "
            "not that of a language; KL divergence and agreement mean what they always do."
        )
    return found


def set_files(sets: Path) -> list[Path]:
    """Return the files of the evaluation sets."""
    data = Data(evaluation=sets)
    files = [sets / WIKITEXT, *Blimp().files(data), *Lambada().files(data)]
    missing = [file for file in files if not file.is_file()]
    if len(files) < 3:
        missing.append(sets / "blimp" / "*.jsonl")
    if missing:
        raise UserError(f"{missing[0]} is not there: name its folder with --eval, or leave it out")
    return files
