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
    values: list[float | None] = [None] * 3
    if len(given := np.asarray(samples)):
        values = [float(f"{value:.6g}") for value in np.percentile(given, (20, 50, 80))]
    names = (f"{prefix}_{name}" for name in ("p20", "median", "p80"))
    return dict(zip(names, values, strict=True))


def shown(row: Mapping[str, Any], prefix: str, digits: int) -> str:
    """Return `median (p20-p80)` of a row's columns; "-" where there is none."""
    if row[f"{prefix}_median"] is None:
        return "-"
    names = ("median", "p20", "p80")
    middle, low, high = (f"{row[f'{prefix}_{name}']:.{digits}f}" for name in names)
    return f"{middle} ({low}-{high})"


def table(rows: Iterable[Mapping[str, Any]]) -> str:
    """Return rows as an aligned table without an index."""
    import pandas as pd

    frame = pd.DataFrame(list(rows)).convert_dtypes().astype(object)
    text = frame.where(frame.notna(), "").to_string(index=False)
    return text if len(frame) else "nothing was measured"


Point = tuple[str, str, str, float | None]
"""Of a plot: its panel, its place along the axis, its line or bar, and its value."""


def draw(
    path: Path, title: str, points: Iterable[Point], *, across: int = 0, **settings: Any
) -> None:
    """Write a PNG of points, if there are any, with panels `across` side by side (0: all). Settings
    are those of `DataFrame.plot`."""
    import pandas as pd
    from matplotlib.figure import Figure

    names = ["panel", "place", "line", "value"]
    panels = dict(list(pd.DataFrame(points, columns=names).groupby("panel", sort=False)))
    if not panels:
        return
    columns = min(across or len(panels), len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(5.5 * columns, 4.2 * rows))
    figure.suptitle(title, fontsize=9)
    for index, (name, inside) in enumerate(panels.items()):
        frame = inside.pivot(index="place", columns="line", values="value").astype(float)
        frame = frame.loc[inside["place"].unique(), inside["line"].unique()]
        axes = figure.add_subplot(rows, columns, index + 1)
        line = {"marker": "o", "linestyle": ":"} if settings.get("kind", "line") == "line" else {}
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
