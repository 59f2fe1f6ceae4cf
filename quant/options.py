"""What the command lines of this package share."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Sequence
from pathlib import Path

from attnserve.errors import UserError
from attnserve.options import positive
from attnserve.sampled_text import writers
from quant.texts import Sources

CHECKPOINTS = Path(__file__).resolve().parents[1] / "checkpoints"


def columns_of_group(text: str) -> int | None:
    """Return the columns of a group, None for `channel`, for argparse."""
    return None if text == "channel" else positive(text)


def bundled_checkpoints() -> list[Path]:
    """Return the checkpoints that come with a checkout of the project.

    Raises:
        UserError: this is none.
    """
    if not (found := _bundled()):
        raise UserError(
            "name a checkpoint's folder: only a checkout of the project has checkpoints of its own"
        )
    return found


def _bundled() -> list[Path]:
    return sorted(file.parent for file in CHECKPOINTS.glob("*/config.json"))


def add_text_options(parser: argparse.ArgumentParser, measured: bool = True) -> None:
    """Add the options that say where text comes from.

    Args:
        parser: of a command.
        measured: the command measures on text, it does not only calibrate.
    """
    group = parser.add_argument_group(
        "text", "Where none is named, the unquantized checkpoint writes it (docs/QUANT.md)."
    )
    if measured:
        group.add_argument(
            "--text",
            nargs="+",
            type=Path,
            default=[],
            metavar="FILE",
            help="UTF-8 text to measure on, in any number of files (default: sampled)",
        )
    group.add_argument(
        "--calibration-text",
        nargs="+",
        type=Path,
        default=[],
        metavar="FILE",
        help="UTF-8 text to calibrate on (default: sampled)",
    )
    group.add_argument(
        "--books",
        type=Path,
        metavar="DIR",
        help="the novels that the reference checkpoints were trained on, for both: two are held "
        "out and measured on (default: none)",
    )
    group.add_argument(
        "--text-from",
        type=Path,
        metavar="CHECKPOINT",
        help="the checkpoint that writes, for all (default: of those with one tokenizer the first "
        "with softmax attention, else the first)",
    )


def sources_of(options: argparse.Namespace, folders: Sequence[Path]) -> dict[Path, Sources]:
    """Return where each checkpoint's text comes from, as the options say.

    Raises:
        UserError, ValueError: options contradict each other, or one cannot write for another.
    """
    given = Sources(
        tuple(getattr(options, "text", ())),
        tuple(options.calibration_text),
        options.books,
        getattr(options, "eval", None),
    )
    if given.sampled:
        found = writers(_with_bundled(folders), options.text_from)
        return {folder: dataclasses.replace(given, writer=found[folder]) for folder in folders}
    if options.text_from is not None:
        raise UserError("--text-from: all text is given, none is written: leave it out")
    return dict.fromkeys(folders, given)


def _with_bundled(folders: Sequence[Path]) -> list[Path]:
    """The checkpoints, and all bundled ones if one of them is: it then reads the same text alone as
    beside the others."""
    bundled = _bundled()
    named = {folder.resolve() for folder in folders}
    if not named & set(bundled):
        return list(folders)
    return [*folders, *(folder for folder in bundled if folder not in named)]
