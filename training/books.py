"""Which of the books the reference checkpoints train on."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

BOOKS = Path(__file__).resolve().parents[2] / "shared" / "data" / "books"
VALIDATION, TEST = "emma.txt", "great_expectations.txt"


class Split(NamedTuple):
    """Text files by what they are for."""

    train: list[Path]
    validation: Path
    test: Path


def split(folder: Path = BOOKS) -> Split:
    """Every `*.txt` of the folder is for training but `emma.txt` and `great_expectations.txt`.

    Raises:
        FileNotFoundError: one of the two, or everything else, is not there.
    """
    validation, test = folder / VALIDATION, folder / TEST
    train = sorted(set(folder.glob("*.txt")) - {validation, test})
    for path in (validation, test):
        if not path.exists():
            raise FileNotFoundError(f"{path} is not there: name the folder of books with --books")
    if not train:
        raise FileNotFoundError(f"{folder} holds no book to train on")
    return Split(train, validation, test)
