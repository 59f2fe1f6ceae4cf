"""Values on command lines, for argparse."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any


def positive(text: str) -> int:
    """Return a whole number above 0.

    Raises:
        argparse.ArgumentTypeError: it is none.
    """
    if not (text.isascii() and text.isdigit() and int(text) > 0):
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def command_line(
    module: str, description: str | None
) -> tuple[argparse.ArgumentParser, Callable[..., None]]:
    """The parser of `python -m module`, and `add(name, text, **settings)`, which adds an option
    whose help ends with its default."""
    parser = argparse.ArgumentParser(
        prog=f"python -m {module}",
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, text: str, **settings: Any) -> None:
        text += "" if settings.get("required") else " (default: %(default)s)"
        parser.add_argument(name, help=text, **settings)

    return parser, add
