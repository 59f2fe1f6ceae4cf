"""Build the reference checkpoints from the novels.

Trains the tokenizer and each model, measures it, and writes a Hugging Face folder with a model
card. What is interrupted goes on where it was when the command is given again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path

from transformers import AutoTokenizer, PreTrainedTokenizerFast

from attn_kernels import VariantError, get_variant, variant_names
from attnserve.evaluation.books import Split, add_books_option, split
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.evaluate import Score, evaluate, held_out, table
from attnserve.evaluation.tokens import read_tokens
from attnserve.files import CHECKOUT
from training.card import card
from training.recipe import Recipe
from training.tokenizer import train_tokenizer
from training.train import LOSSES, Run

RECIPE = Recipe(precision="bf16")
VOCAB_SIZE = 2048
COMPILED = True
EXTRA = {"selective_prunable": ("selective", dataclasses.replace(RECIPE, memory_loss=0.1))}
"""Checkpoints beside the one of each variant, which has the variant's name and `RECIPE`."""


def shared_tokenizer(books: Split, runs: Path) -> PreTrainedTokenizerFast:
    """The tokenizer of every reference checkpoint; trained at the first call, kept in `runs`."""
    if not (runs / "tokenizer").exists():
        made = train_tokenizer(books.train, VOCAB_SIZE, RECIPE.context)
        made.save_pretrained(runs / "tokenizer.tmp")
        (runs / "tokenizer.tmp").rename(runs / "tokenizer")
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(runs / "tokenizer")
    return tokenizer


def build(
    name: str, books: Split, runs: Path, out: Path, recipe: Recipe | None = None
) -> list[Score]:
    """Train and measure one checkpoint; its variant has its default parameters.

    Args:
        name: a variant's, or one of `EXTRA`.
        books: text files.
        runs: folder for the training state.
        out: folder in which the checkpoint's folder is written.
        recipe: the settings of the run if they are not the checkpoint's own.

    Returns:
        The checkpoint's scores and its baselines'.
    """
    tokenizer = shared_tokenizer(books, runs)
    tokens = read_tokens(books.train, tokenizer)
    variant, own_recipe = EXTRA.get(name, (name, RECIPE))
    run = Run(runs / name, recipe or own_recipe, {"name": variant}, tokenizer, tokens)
    run.train(save_every=100, compiled=COMPILED)
    staged = runs / name / "model"
    shutil.rmtree(staged, ignore_errors=True)
    run.export(staged)
    trained = Checkpoint(staged)
    scores = evaluate(trained, held_out(trained, books), books.train)
    (staged / "README.md").write_text(card(name, run, scores, books.train), encoding="utf-8")
    shutil.copy(runs / name / LOSSES, staged)
    out.mkdir(parents=True, exist_ok=True)
    shutil.rmtree(out / name, ignore_errors=True)
    shutil.move(staged, out / name)
    return scores


def variant_name(text: str) -> str:
    """An argument that must be a registered variant."""
    try:
        return get_variant(text).name
    except VariantError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def checkpoint_name(text: str) -> str:
    """An argument that must be a registered variant or one of `EXTRA`."""
    return text if text in EXTRA else variant_name(text)


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="training.checkpoints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "names",
        nargs="*",
        default=variant_names(),
        type=checkpoint_name,
        metavar="NAME",
        help=f"any of {', '.join(variant_names())} (default: all of these) or {', '.join(EXTRA)}",
    )
    add_books_option(parser)
    parser.add_argument(
        "--runs",
        type=Path,
        default=CHECKOUT / "runs",
        help="training states (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=CHECKOUT / "checkpoints",
        help="checkpoints (default: %(default)s)",
    )
    arguments = parser.parse_args(argv)
    try:
        books = split(arguments.books)
    except FileNotFoundError as error:
        parser.error(str(error))
    arguments.runs.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in arguments.names:
        print(f"{name}:")
        results[name] = build(name, books, arguments.runs, arguments.out)
        print(table(results[name]))
    print(json.dumps({name: [dataclasses.asdict(s) for s in r] for name, r in results.items()}))


if __name__ == "__main__":
    main()
