"""The section about turning a softmax model into one of SSMax."""

from __future__ import annotations

import pandas as pd

from attnserve.reports import table
from training.positions import FIRST_BIN, against, octaves

BASELINE = "smollm2-softmax"


def swapping(measured: pd.DataFrame | None) -> str:
    """SmolLM2-135M by position in long texts, before and after.

    Args:
        measured: the table of `training.long_context`, or None.
    """
    if measured is None or BASELINE not in set(measured["model"]):
        return f"No results of `python -m training.long_context` for {BASELINE}."
    models = measured.drop_duplicates("model").set_index("model")
    length = int(models.loc[BASELINE, "train_length"])
    rows = octaves(measured)
    rows = rows[rows["octave"] >= length // 8]
    summary = against(rows, "octave", BASELINE).set_index(["model", "octave"])
    columns = sorted(rows["octave"].unique())
    lines = []
    for model in models.index:
        cells = []
        for octave in columns:
            row = summary.loc[(model, octave)]
            change = "" if model == BASELINE else f" ({row.change:+.3f})"
            cells.append(f"{row.loss:.3f}{change}")
        tuned = models.loc[model, "finetuning"] or "no"
        lines.append([str(model), f"{models.loc[model, 'rope_theta']:g}", str(tuned), *cells])
    places = measured.drop_duplicates(["text", "start"])
    dtype = ", ".join(sorted(measured["dtype"].unique()))
    heads = [f"{1 if octave == FIRST_BIN else octave // 2 + 1} to {octave}" for octave in columns]
    return (
        f"SmolLM2-135M, trained with softmax on {length} tokens, and the same weights under SSMax "
        "with one initial scale, 1 over the mean of ln n (`python -m training.convert`), some of "
        "them fine-tuned for the scales alone. Loss in nats per token by how many tokens have been "
        f"read, on {len(places)} {'window' if len(places) == 1 else 'windows'} of the held-out "
        f"books, {dtype}, through vLLM (`python -m training.long_context`); in brackets the "
        f"difference to {BASELINE}.\n\n" + table(["", "theta", "fine-tuning", *heads], lines, 3)
    )
