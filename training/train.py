"""Train a small Llama with an attention variant on text files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Option

from attnserve.command import AsJson, main, needs, options_of
from attnserve.errors import UserError
from training.arguments import Data, Variant
from training.recipe import TrainingRecipe


@options_of(TrainingRecipe)
@needs("train")
def train(
    variant: Variant,
    data: Data,
    tokenizer: Annotated[
        Path, Option(help="Folder written by training.tokenizer.", show_default=False)
    ],
    out: Annotated[Path, Option(help="Folder of the run.", show_default=False)],
    save_every: Annotated[int, Option(min=1, help="Steps between saved states.")] = 100,
    compiled: Annotated[
        bool, Option("--compile", help="Use torch.compile: many times faster after some minutes.")
    ] = False,
    as_json: AsJson = False,
    *,
    recipe: TrainingRecipe,
) -> None:
    """Train a small Llama with an attention variant on text files.

    The run can be killed at any moment and started again with the same command: it goes on from its
    last saved state and ends in the same bits as a run that was never interrupted.
    """
    from transformers import AutoTokenizer

    from attnserve.evaluation.texts import read_tokens
    from training.run import MODEL, Run

    if not (tokenizer / "tokenizer.json").is_file():
        raise UserError(f"--tokenizer {tokenizer} has no tokenizer.json")
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    run = Run(out, recipe, variant, loaded, read_tokens(data, loaded))
    run.train(save_every, compiled)
    run.export(out / MODEL)
    last = sum(run.losses[-100:]) / len(run.losses[-100:])
    if as_json:
        record = {
            "model": str(out / MODEL),
            "steps": run.step,
            "seconds": round(run.seconds, 1),
            "tokens": run.step * recipe.batch * recipe.context,
            "loss_last_100": round(last, 5),
        }
        print(json.dumps(record))
        return
    print(f"{run.step} steps in {run.seconds / 60:.1f} min, mean loss of the last 100: {last:.4f}")
    print(f"The model is in {out / MODEL}")


if __name__ == "__main__":
    main(train, "python -m training.train")
