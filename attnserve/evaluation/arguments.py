"""Arguments that several commands have; nothing heavy is imported."""

from pathlib import Path
from typing import Annotated

import typer
from typer import Argument, Option

SETS = "lambada_test.jsonl, blimp/*.jsonl, wikitext2_test_raw.txt"
"""What a folder of evaluation sets holds."""


def positive(text: str) -> float:
    """Return a finite number above 0."""
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < float("inf"):
        raise typer.BadParameter(f"{text} is not a number above 0")
    return number


CheckpointFolder = Annotated[
    Path, Argument(metavar="CKPT", help="A Hugging Face folder.", show_default=False)
]
Books = Annotated[
    Path | None,
    Option(
        metavar="DIR",
        help="Folder of the novels. Default: where `attnserve books` puts them.",
        show_default=False,
    ),
]
Texts = Annotated[
    list[Path] | None, Option(metavar="FILE", help="UTF-8 text files.", show_default=False)
]
