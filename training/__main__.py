"""List the commands of this package."""

from __future__ import annotations

from attnserve.commands import list_commands

COMMANDS = (
    "training.train",
    "training.tokenizer",
    "training.convert",
    "training.long_context",
    "training.analyze",
    "training.report",
    "training.checkpoints",
    "training.learning_rate",
)

if __name__ == "__main__":
    list_commands(
        "training", "Train and measure small models of every attention variant.", COMMANDS
    )
