"""Measure what the papers of the variants report, on trained checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

from typer import Argument, Option

from attnserve.command import AsJson, main, needs, options_of
from attnserve.errors import UserError
from attnserve.evaluation.arguments import SETS, Books
from training.analyze.settings import TITLES, AnalysisSettings, Name


@options_of(AnalysisSettings)
@needs("train")
def analyze(
    checkpoints: Annotated[
        list[Path], Argument(metavar="CKPT", help="Hugging Face folders.", show_default=False)
    ],
    measures: Annotated[
        list[Name] | None,
        Option(
            metavar="MEASURE",
            help="; ".join(f"{name}: {title}" for name, title in TITLES.items())
            + ". Default: all.",
        ),
    ] = None,
    books: Books = None,
    sets: Annotated[
        Path | None, Option("--eval", metavar="DIR", help=f"Folder of the evaluation sets: {SETS}.")
    ] = None,
    as_json: AsJson = False,
    *,
    settings: AnalysisSettings,
) -> None:
    """Measure what the papers of the variants report, on trained checkpoints.

      python -m training.analyze checkpoints/softmax checkpoints/softpick

    Each result is a file, CHECKPOINT/MEASURE.json under --out; one that is there already for the
    same weights, texts and settings is not measured again. `python -m training.report` compares
    them.
    """
    import pandas as pd
    import transformers
    from tqdm import tqdm

    from attnserve.evaluation.measures import Data
    from training.analyze import run

    transformers.utils.logging.disable_progress_bar()
    names = [folder.resolve().name for folder in checkpoints]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two checkpoints are called {min(twice)}: their results would clash")
    results = [
        stored
        for folder in tqdm(checkpoints, desc="checkpoints", disable=len(names) < 2)
        for stored in run.analyze(folder, measures or list(Name), Data(books, sets), settings)
    ]
    figures: dict[str, dict[str, list[float | None]]] = {}
    shown: dict[str, dict[str, str]] = {}
    for stored in results:
        for name, estimate in stored.result.summary.items():
            figure = f"{stored.measure}: {name}"
            figures.setdefault(stored.checkpoint, {})[figure] = estimate.json()
            shown.setdefault(stored.checkpoint, {})[figure] = estimate.shown()
    if as_json:
        found = {"out": str(settings.out), "engine": settings.engine, "figures": figures}
        print(json.dumps(found))
    else:
        print(pd.DataFrame(shown).fillna("").to_string())


if __name__ == "__main__":
    main(analyze, "python -m training.analyze")
