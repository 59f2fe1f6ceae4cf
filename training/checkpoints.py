"""Build the reference checkpoints from the novels."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from attnserve.command import AsJson, main, needs
from attnserve.evaluation.arguments import Books
from attnserve.evaluation.books import Split, split
from attnserve.files import CHECKOUT
from training.arguments import RUNS, Runs, variant_name
from training.recipe import TrainingRecipe

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerFast

    from attnserve.evaluation.perplexity import Score
    from training.run import Run

RECIPE = TrainingRecipe(precision="bf16")
VOCAB_SIZE = 2048
COMPILED = True
EXTRA = {"selective_prunable": ("selective", dataclasses.replace(RECIPE, memory_loss=0.1))}
"""Checkpoints beside the one of each variant, which has the variant's name and `RECIPE`."""


def shared_tokenizer(books: Split, runs: Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer of every reference checkpoint, which the first call trains and keeps in
    `runs`."""
    from transformers import AutoTokenizer

    from training.tokenizer import train_tokenizer

    if not (runs / "tokenizer").exists():
        made = train_tokenizer(books.train, VOCAB_SIZE, RECIPE.context)
        made.save_pretrained(runs / "tokenizer.tmp")
        (runs / "tokenizer.tmp").rename(runs / "tokenizer")
    tokenizer: PreTrainedTokenizerFast = AutoTokenizer.from_pretrained(runs / "tokenizer")
    return tokenizer


def build(
    name: str, books: Split, runs: Path, out: Path, recipe: TrainingRecipe | None = None
) -> list[Score]:
    """Train and measure one checkpoint, `out/name`, and return its scores and its baselines'.

    `name` is a variant's, which then has its default parameters, or one of `EXTRA`. The training
    state is in `runs`; the recipe is the checkpoint's own unless another is given.
    """
    from attnserve.evaluation.checkpoint import Checkpoint
    from attnserve.evaluation.perplexity import evaluate
    from attnserve.evaluation.texts import held_out, read_tokens
    from training.run import LOSSES, Run

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


def card(name: str, run: Run, scores: Sequence[Score], train_files: Sequence[Path]) -> str:
    """Return a checkpoint's model card, from `card.md.j2`."""
    from attnserve import machine
    from attnserve.evaluation.perplexity import table
    from attnserve.reports import templates

    recipe = run.recipe
    settings = dataclasses.asdict(recipe).items()
    template = templates(Path(__file__).parent).get_template("card.md.j2")
    return template.render(
        name=name,
        run=run,
        recipe=recipe,
        variant=run.model.config.variant,
        size=sum(p.numel() for p in run.model.parameters()) / 1e6,
        text=len(run.batches.tokens),
        seen=recipe.steps * recipe.batch * recipe.context,
        last=run.losses[-100:],
        settings=[(setting.replace("_", " "), value) for setting, value in settings],
        books=", ".join(f"`{file.name}`" for file in train_files),
        machine=machine.summary(),
        scores=table(scores),
    )


def checkpoint_name(text: str) -> str:
    """Return the name of a checkpoint, if there is one of that name (`variant_name`)."""
    return text if text in EXTRA else variant_name(text)


@needs("train")
def checkpoints(
    names: Annotated[
        list[str] | None,
        Argument(
            metavar="NAME",
            parser=checkpoint_name,
            help=f"Variants (default: every one), or {', '.join(EXTRA)}.",
        ),
    ] = None,
    books: Books = None,
    runs: Runs = RUNS,
    out: Annotated[Path, Option(help="Folder of the checkpoints.")] = CHECKOUT / "checkpoints",
    as_json: AsJson = False,
) -> None:
    """Build the reference checkpoints from the novels, an hour each.

    Trains the tokenizer and each model, measures it, and writes a Hugging Face folder with a model
    card. What is interrupted goes on where it was when the command is given again.
    """
    from attn_kernels import variant_names
    from attnserve.evaluation.perplexity import table

    novels = split(books)
    runs.mkdir(parents=True, exist_ok=True)
    results = {}
    for name in names or variant_names():
        results[name] = build(name, novels, runs, out)
        if not as_json:
            print(f"{name}:\n{table(results[name])}", flush=True)
    if as_json:
        print(json.dumps({name: [s.json() for s in scores] for name, scores in results.items()}))


if __name__ == "__main__":
    main(checkpoints, "python -m training.checkpoints")
