"""Measure whether one learning rate is fair to every variant.

Trains every variant for a short while at several peak rates, same text, order and seed, and
measures each on the validation book. What is interrupted goes on where it was; a result that is in
the table already is not measured again.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pandas as pd
import torch
from torch.nn.functional import cross_entropy
from transformers import PreTrainedTokenizerFast

from attn_kernels import variant_names
from attnserve.evaluation.books import add_books_option, split
from attnserve.evaluation.tokens import Tokens, read_tokens, sequence
from attnserve.files import CHECKOUT
from hf_attn import VariantLlamaForCausalLM
from training.checkpoints import COMPILED, RECIPE, shared_tokenizer, variant_name
from training.train import Run

RATES = (1e-3, 2e-3, 4e-3)
SHORT = dataclasses.replace(RECIPE, steps=120, warmup=20)
SEQUENCES = 96
"""Sequences of the validation book, from its beginning: 49,152 tokens."""
TABLE = CHECKOUT / "training" / "results" / "learning_rate.csv"


@torch.no_grad()
def validation_loss(
    model: VariantLlamaForCausalLM, tokens: Tokens, context: int, bos: int
) -> tuple[float, float]:
    """Mean loss in nats per token over `SEQUENCES` sequences, and its standard error over them."""
    means = []
    for start in range(0, min(SEQUENCES, len(tokens) // context) * context, context):
        inputs, targets = map(torch.from_numpy, sequence(tokens, start, context, bos))
        logits = model(input_ids=inputs[None], use_cache=False).logits[0]
        means.append(float(cross_entropy(logits.float(), targets)))
    losses = pd.Series(means)
    return float(losses.mean()), float(losses.sem())


def measure(
    name: str, rate: float, folder: Path, train: Tokens, held: Tokens, tok: PreTrainedTokenizerFast
) -> dict[str, str | float | int]:
    """One short run: a row of the table.

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
    loss, error = validation_loss(run.model.eval(), held, recipe.context, tok.bos_token_id)
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


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="training.learning_rate",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("variants", nargs="*", type=variant_name, default=variant_names())
    parser.add_argument(
        "--rates", nargs="+", type=float, default=RATES, help="peak rates (default: %(default)s)"
    )
    add_books_option(parser)
    parser.add_argument(
        "--runs",
        type=Path,
        default=CHECKOUT / "runs",
        help="training states (default: %(default)s)",
    )
    parser.add_argument("--csv", type=Path, default=TABLE, help="the table (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        books = split(options.books)
    except FileNotFoundError as error:
        parser.error(str(error))
    tokenizer = shared_tokenizer(books, options.runs)
    train, held = read_tokens(books.train, tokenizer), read_tokens([books.validation], tokenizer)
    rows = pd.read_csv(options.csv).to_dict("records") if options.csv.exists() else []
    done = {(row["variant"], row["learning_rate"]) for row in rows}
    for name in options.variants:
        for rate in options.rates:
            if (name, rate) in done:
                continue
            print(f"{name} at {rate:g}:")
            folder = options.runs / "learning_rate" / f"{name}-{rate:g}"
            rows.append(measure(name, rate, folder, train, held, tokenizer))
            options.csv.parent.mkdir(parents=True, exist_ok=True)
            pd.DataFrame(rows).to_csv(options.csv, index=False, lineterminator="\n")
    table = pd.DataFrame(rows)
    print(table.pivot_table("validation_loss", "variant", "learning_rate").to_string())
    print(json.dumps({"rows": rows}))


if __name__ == "__main__":
    main()
