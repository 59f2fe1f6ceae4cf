"""What benchmarks share to write: figures of samples, rows of CSV files, tables, plots."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from attnserve.errors import UserError
from attnserve.files import replacing

if TYPE_CHECKING:
    import pandas as pd
    from numpy.typing import ArrayLike

Row = dict[str, Any]


def spread(prefix: str, samples: ArrayLike) -> dict[str, float | None]:
    """Return columns `<prefix>_p20`, `<prefix>_median` and `<prefix>_p80`; None without samples."""
    given = np.asarray(samples)
    values = np.percentile(given, (20, 50, 80)) if given.size else (None, None, None)
    names = (f"{prefix}_{name}" for name in ("p20", "median", "p80"))
    return {
        name: None if value is None else float(f"{value:.6g}")
        for name, value in zip(names, values, strict=True)
    }


def shown(row: Mapping[str, Any], prefix: str, digits: int, ends: str = "p20 p80") -> str:
    """Return `median (low-high)` of a row's columns; "-" where there is none."""
    low, high = ends.split()
    values = [row[f"{prefix}_{name}"] for name in ("median", low, high)]
    if values[0] is None:
        return "-"
    middle, low, high = (f"{value:.{digits}f}" for value in values)
    return f"{middle} ({low}-{high})"


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as an aligned table without an index."""
    import pandas as pd

    frame = pd.DataFrame(list(rows)).convert_dtypes().astype(object)
    text = frame.where(frame.notna(), "").to_string(index=False)
    return text if len(frame) else "nothing was measured"


def draw(
    path: Path, title: str, panels: Mapping[str, pd.DataFrame], *, across: int = 0, **settings: Any
) -> None:
    """Write a PNG with a panel for each frame, `across` side by side (0: all): a line or bars a
    column, along the frame's index. Settings are those of `DataFrame.plot`."""
    from matplotlib.figure import Figure

    columns = min(across or len(panels), len(panels))
    rows = -(-len(panels) // max(1, columns))
    figure = Figure(figsize=(5.5 * columns, 4.2 * rows))
    figure.suptitle(title, fontsize=9)
    for index, (name, frame) in enumerate(panels.items()):
        axes = figure.add_subplot(rows, columns, index + 1)
        line = {"marker": "o", "linestyle": ":"} if settings.get("kind", "line") == "line" else {}
        frame = frame.astype(float)
        frame.plot(ax=axes, title=name, legend=index == 0, xlabel="", **line, **settings)
        axes.set_xticks(range(len(frame)), frame.index, rotation=60, ha="right", fontsize=7)
    figure.tight_layout()
    with replacing(path) as partial:
        figure.savefig(partial, dpi=110, format="png")


def read_csv(path: Path) -> pd.DataFrame:
    """Return a CSV file's cells as text, so that numbers and empty cells stay what they are.

    Raises:
        OSError, ValueError: it is no file that can be read, or no CSV.
    """
    import pandas as pd

    return pd.read_csv(path, dtype=str, keep_default_na=False)


def rows_with(path: Path, values: Mapping[str, Any]) -> pd.DataFrame:
    """Return a CSV file's rows (`read_csv`) that have these values; `date` may be another."""
    frame = read_csv(path)
    same = {name: str(value) for name, value in values.items() if name != "date"}
    return frame[(frame[list(same)] == list(same.values())).all(axis=1)]


def checked(path: Path, no_save: bool) -> Path | None:
    """Return the CSV file that rows are added to; None if none is written."""
    if no_save:
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.exists():
            read_csv(path)
            path.open("a").close()
        if not os.access(path.parent, os.W_OK):
            raise PermissionError(f"no permission to write in {path.parent}")
    except (OSError, ValueError) as error:
        raise UserError(f"results cannot be written: {error}") from error
    return path


def append_csv(path: Path, about: Mapping[str, Any], rows: Sequence[Row]) -> None:
    """Add rows to a CSV file, `about` being columns that all share. What is in the file stays as it
    is; columns that it lacks come last."""
    import pandas as pd

    added = pd.DataFrame([{**about, **row} for row in rows])
    if path.exists():
        added = pd.concat([read_csv(path), added])
    with replacing(path) as partial:
        added.to_csv(partial, index=False, float_format="%.6g")


def report(
    about: Mapping[str, Any], rows: Sequence[Row], text: str, *, csv: Path | None, as_json: bool
) -> None:
    """Add what was measured to a CSV file, if one is named, and print it: the text, a table for
    people, or one JSON object of `about`, what the run was made on and with, and the rows."""
    if csv is not None and rows:
        append_csv(csv, about, rows)
    print(json.dumps({**about, "rows": rows}) if as_json else text)
