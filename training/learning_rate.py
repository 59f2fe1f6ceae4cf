"""Measure whether one learning rate is fair to every variant."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import Annotated

import pandas as pd
from transformers import PreTrainedTokenizerFast
from typer import Argument, Option

from attn_kernels import variant_names
from attnserve.command import AsJson, main, needs
from attnserve.evaluation.arguments import Books
from attnserve.evaluation.books import split
from attnserve.evaluation.scorers import Item, TransformersScorer
from attnserve.evaluation.texts import Tokens, read_tokens
from attnserve.files import CHECKOUT, write_text
from training.arguments import RUNS, Runs, variant_name
from training.checkpoints import COMPILED, RECIPE, shared_tokenizer
from training.run import Run

RATES = (1e-3, 2e-3, 4e-3)
SHORT = dataclasses.replace(RECIPE, steps=120, warmup=20)
SEQUENCES = 96
"""Sequences of the validation book, from its beginning: 49,152 tokens."""
TABLE = CHECKOUT / "training" / "results" / "learning_rate.csv"


def measure(
    name: str, rate: float, folder: Path, train: Tokens, held: Tokens, tok: PreTrainedTokenizerFast
) -> dict[str, str | float | int]:
    """Return a row of the table, measured by one short run.

    Args:
        name: the variant.
        rate: peak learning rate.
        folder: of the run's state.
        train: tokens to train on.
        held: tokens to measure on.
        tok: their tokenizer.
    """
    recipe = dataclasses.replace(SHORT, learning_rate=rate)
    run = Run(folder, recipe, {"name": name}, tok, train)
    run.train(save_every=20, compiled=COMPILED)
    count = min(SEQUENCES, len(held) // recipe.context)
    pieces = held[: count * recipe.context].reshape(count, recipe.context)
    items = [Item([tok.bos_token_id], piece.tolist()) for piece in pieces]
    scores = TransformersScorer(run.model.eval()).score(items, f"{name} at {rate:g}")
    losses = pd.Series([-scored.logprobs.mean() for scored in scores])
    loss, error = float(losses.mean()), float(losses.sem())
    return {
        "variant": name,
        "learning_rate": rate,
        "steps": recipe.steps,
        "tokens": recipe.steps * recipe.batch * recipe.context,
        "seed": recipe.seed,
        # A run that diverged has lost, whatever number it ended on.
        "train_loss": round(sum(run.losses[-20:]) / 20, 4),
        "validation_loss": round(loss, 4) if math.isfinite(loss) else math.inf,
        "standard_error": round(error, 4),
    }


@needs("train")
def learning_rate(
    variants: Annotated[
        list[str] | None,
        Argument(metavar="VARIANT", parser=variant_name, help="Default: all of them."),
    ] = None,
    rates: Annotated[
        list[float] | None, Option(help=f"Peak rates. Default: {' '.join(map(str, RATES))}.")
    ] = None,
    books: Books = None,
    runs: Runs = RUNS,
    csv: Annotated[Path, Option(help="The table.")] = TABLE,
    as_json: AsJson = False,
) -> None:
    """Measure whether one learning rate is fair to every variant.

    Trains every variant for a short while at several peak rates, same text, order and seed, and
    measures each on the validation book. What is interrupted goes on where it was; a result that is
    in the table already is not measured again.
    """
    novels = split(books)
    tokenizer = shared_tokenizer(novels, runs)
    train, held = read_tokens(novels.train, tokenizer), read_tokens([novels.validation], tokenizer)
    rows = pd.read_csv(csv).to_dict("records") if csv.exists() else []
    done = {(row["variant"], row["learning_rate"]) for row in rows}
    for name, rate in itertools.product(variants or variant_names(), rates or RATES):
        if (name, rate) not in done:
            folder = runs / "learning_rate" / f"{name}-{rate:g}"
            rows.append(measure(name, rate, folder, train, held, tokenizer))
            write_text(csv, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))
    if as_json:
        print(json.dumps({"rows": rows}))
    else:
        table = pd.DataFrame(rows)
        print(table.pivot_table("validation_loss", "variant", "learning_rate").to_string())


if __name__ == "__main__":
    main(learning_rate, "python -m training.learning_rate")
