"""The commands of this package under one name; each is also `python -m training.COMMAND`."""

from __future__ import annotations

from attnserve.command import run_package
from training.analyze.__main__ import analyze
from training.chats import chats
from training.checkpoints import checkpoints
from training.compare.__main__ import compare
from training.convert import convert
from training.learning_rate import learning_rate
from training.long_context import long_context
from training.report.__main__ import report
from training.tokenizer import tokenizer
from training.tokens import tokens
from training.train import train

COMMANDS = (
    train,
    tokenizer,
    tokens,
    chats,
    convert,
    compare,
    long_context,
    analyze,
    report,
    checkpoints,
    learning_rate,
)

if __name__ == "__main__":
    about = "Train and measure small models of every attention variant."
    run_package("python -m training", about, *COMMANDS)
