"""What the benchmarks' command lines share."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from attnserve.options import positive

__all__ = ["command_line", "positive"]


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
