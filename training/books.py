"""Which of the books the reference checkpoints train on, and where they are found."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import NamedTuple

from attn_kernels.cpu.build import BuildError, cache_folder

VALIDATION, TEST = "emma.txt", "great_expectations.txt"
WAYS = (
    "fetch the thirteen novels with `python -m training.books` (network), or name their folder "
    "with --books DIR"
)

BOOKS: Path | None = None


class Split(NamedTuple):
    """Text files by what they are for."""

    train: list[Path]
    validation: Path
    test: Path


def books_folder() -> Path:
    """Return the folder in which `python -m training.books` puts the novels.

    Raises:
        FileNotFoundError: this user has no cache folder.
    """
    try:
        return cache_folder() / "books"
    except BuildError as error:
        raise FileNotFoundError(f"no place for the novels: {error}, or give --books DIR") from None


def split(folder: Path | None = None) -> Split:
    """Return the text files: all of the folder are for training but the two of `VALIDATION` and
    `TEST`.

    Args:
        folder: of `*.txt`; None: the fetched novels.

    Raises:
        FileNotFoundError: one of the two, or everything else, is not there.
    """
    folder = folder or books_folder()
    validation, test = folder / VALIDATION, folder / TEST
    train = sorted(set(folder.glob("*.txt")) - {validation, test})
    for path in (validation, test):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is not there: {WAYS}")
    if not train:
        raise FileNotFoundError(f"{folder} holds no book to train on: {WAYS}")
    return Split(train, validation, test)


def add_books_option(parser: argparse.ArgumentParser) -> None:
    """Add --books, which is None where the user does not name it: the fetched novels."""
    parser.add_argument(
        "--books",
        type=Path,
        metavar="DIR",
        help="folder of the novels (default: where `python -m training.books` puts them)",
    )
