"""The model card of a reference checkpoint, from `card.md.j2`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from attnserve import machine
from attnserve.evaluation.perplexity import Score, table
from attnserve.reports import templates
from training.run import Run


def card(name: str, run: Run, scores: Sequence[Score], train_files: Sequence[Path]) -> str:
    """Return the text of `README.md`.

    Args:
        name: the checkpoint's.
        run: a finished run.
        scores: what `attnserve.evaluation.perplexity.evaluate` gives.
        train_files: what it was trained on.
    """
    recipe = run.recipe
    settings = dataclasses.asdict(recipe).items()
    return (
        templates(Path(__file__).parent)
        .get_template("card.md.j2")
        .render(
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
    )
