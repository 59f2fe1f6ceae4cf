"""Measure whether one learning rate is fair to every variant."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from typer import Argument, Option

from attnserve.command import AsJson, main, needs
from attnserve.evaluation.arguments import Books
from attnserve.evaluation.books import split
from attnserve.files import CHECKOUT, write_text
from training.arguments import RUNS, Runs, variant_name
from training.checkpoints import COMPILED, RECIPE, shared_tokenizer

if TYPE_CHECKING:
    from attnserve.evaluation.texts import Tokens
    from training.run import Run

RATES = (1e-3, 2e-3, 4e-3)
SHORT = dataclasses.replace(RECIPE, steps=120, warmup=20)
SEQUENCES = 96
"""Sequences of the validation book, from its beginning: 49,152 tokens."""
TABLE = CHECKOUT / "training" / "results" / "learning_rate.csv"


def measure(run: Run, held: Tokens) -> dict[str, str | float | int]:
    """Return the table's row of a finished run, judged on tokens that it was not trained on."""
    import pandas as pd

    from attnserve.evaluation.scorers import Item, TransformersScorer

    recipe, name = run.recipe, run.model.config.variant.name
    count = min(SEQUENCES, len(held) // recipe.context)
    pieces = held[: count * recipe.context].reshape(count, recipe.context)
    items = [Item([run.batches.bos], piece.tolist()) for piece in pieces]
    label = f"{name} at {recipe.learning_rate:g}"
    scores = TransformersScorer(run.model.eval()).score(items, label)
    losses = pd.Series([-scored.logprobs.mean() for scored in scores])
    loss, error = float(losses.mean()), float(losses.sem())
    return {
        "variant": name,
        "learning_rate": recipe.learning_rate,
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
    import pandas as pd

    from attn_kernels import variant_names
    from attnserve.evaluation.texts import read_tokens
    from training.run import Run

    novels = split(books)
    tokenizer = shared_tokenizer(novels, runs)
    train, held = read_tokens(novels.train, tokenizer), read_tokens([novels.validation], tokenizer)
    rows = pd.read_csv(csv).to_dict("records") if csv.exists() else []
    done = {(row["variant"], row["learning_rate"]) for row in rows}
    for name, rate in itertools.product(variants or variant_names(), rates or RATES):
        if (name, rate) not in done:
            folder = runs / "learning_rate" / f"{name}-{rate:g}"
            recipe = dataclasses.replace(SHORT, learning_rate=rate)
            run = Run(folder, recipe, {"name": name}, tokenizer, train)
            run.train(save_every=20, compiled=COMPILED)
            rows.append(measure(run, held))
            write_text(csv, pd.DataFrame(rows).to_csv(index=False, lineterminator="\n"))
    if as_json:
        print(json.dumps({"rows": rows}))
    else:
        table = pd.DataFrame(rows)
        print(table.pivot_table("validation_loss", "variant", "learning_rate").to_string())


if __name__ == "__main__":
    main(learning_rate, "python -m training.learning_rate")
