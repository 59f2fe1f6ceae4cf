"""Every output, from the results' folder alone."""

from __future__ import annotations

from pathlib import Path

from quant import store
from quant.report import frontier
from quant.report.frame import frame
from quant.report.page import page
from quant.report.plots import draw
from quant.schemes.registry import installed


def write(folder: Path) -> dict[str, str]:
    """Write `configs.csv`, `configs.json`, `configs.parquet`, `plots/*.png` and `report.html` into
    the folder of results; returns their paths by kind.

    Raises:
        ValueError: there are no results, or a file is none.
    """
    results = store.read_all(folder)
    rows = frame(results)
    written = {}

    def put(kind: str, name: str, content: str) -> None:
        store.put(folder / name, content)
        written[kind] = str(folder / name)

    put("csv", "configs.csv", rows.to_csv(index=False))
    put("json", "configs.json", rows.to_json(orient="records", indent=1) + "\n")
    if installed("pyarrow"):
        rows.to_parquet(folder / "configs.parquet")
        written["parquet"] = str(folder / "configs.parquet")
    plots = draw(results, folder / "plots", frontier.read_all(folder))
    written |= {f"plot {name}": str(path) for name, path in plots.items()}
    put("html", "report.html", page(results, plots))
    return written
