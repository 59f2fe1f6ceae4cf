"""List the commands of this package."""

from __future__ import annotations

import sys

from attnserve.commands import command_list

COMMANDS = (
    "training.evaluate",
    "training.train",
    "training.tokenizer",
    "training.convert",
    "training.budgets",
    "training.long_context",
    "training.analyze",
    "training.report",
    "training.books",
    "training.checkpoints",
    "training.learning_rate",
)


def main() -> None:
    """Print the list; arguments are refused, since this is no command itself."""
    print("Train and measure small models of every attention variant. Commands, each with --help:")
    print(command_list(COMMANDS))
    if sys.argv[1:] not in ([], ["--help"], ["-h"]):
        line = f"python -m training: {sys.argv[1]!r} is no command: use one of these"
        print(line, file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
