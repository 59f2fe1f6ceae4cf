"""Measure how loss grows with the position in a long text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Literal

from typer import Argument, Option

from attnserve.command import AsJson, main, needs
from attnserve.errors import UserError
from attnserve.evaluation.arguments import Books, Texts
from attnserve.evaluation.books import split
from attnserve.files import CHECKOUT

CSV = CHECKOUT / "training" / "results" / "long_context.csv"


@needs("train")
def long_context(
    checkpoints: Annotated[
        list[Path] | None, Argument(metavar="CKPT", help="Hugging Face folders.")
    ] = None,
    length: Annotated[int, Option(min=1, help="Tokens of a window.")] = 32768,
    windows: Annotated[int, Option(min=1, help="Windows in all; the texts take turns.")] = 4,
    spacing: Annotated[
        int, Option(min=1, help="Tokens between the beginnings of windows.")
    ] = 32768,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], Option(help="Of weights, activations and cache.")
    ] = "float32",
    csv: Annotated[Path, Option(help="The table.")] = CSV,
    texts: Texts = None,
    books: Books = None,
    as_json: AsJson = False,
) -> None:
    """Measure how loss grows with the position in a long text.

    Each checkpoint reads the same windows of --texts, else of the held-out novels, through vLLM and
    this project's kernels, and the table has its mean loss (nats per token) by how many tokens it
    has read before, the begin-of-text token included. Errors are standard errors over the windows.
    Checkpoints are compared with the first of them, window by window, since windows differ more
    than checkpoints do.

    Every window is added to the CSV as soon as it is measured, and a window that is there is not
    measured again: the same command goes on where it was, and one with more --windows or a greater
    --length adds what is missing. Without checkpoints, the command shows what the CSV has.
    """
    from training import positions

    chosen = checkpoints or []
    for checkpoint in chosen:
        positions.describe(checkpoint)  # refuses a wrong one before anything is measured
    if chosen and not texts:
        novels = split(books)
        texts = [novels.validation, novels.test]
    for checkpoint in chosen:
        positions.measure(checkpoint, texts or (), csv, length=length, windows=windows,
                          spacing=spacing, dtype=dtype)  # fmt: skip
    table = positions.read(csv)
    table = table[table["dtype"] == dtype] if len(table) else table
    if table.empty:
        raise UserError(f"{csv} has no {dtype} rows: name a checkpoint to measure")
    names = [checkpoint.name for checkpoint in chosen] or list(table["model"].unique())
    table = table[table["model"].isin(names)]
    summary = positions.against(positions.octaves(table), "octave", names[0])
    if as_json:
        print(json.dumps({"rows": json.loads(summary.round(5).to_json(orient="records"))}))
    else:
        shown = summary.sort_values("octave", kind="stable")
        print(positions.text_table(shown, names[0]))


if __name__ == "__main__":
    main(long_context, "python -m training.long_context")
