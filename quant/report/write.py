"""Every output of a sweep, from the folder of its results alone."""

import base64
from pathlib import Path

from attnserve.files import replacing, write_text
from attnserve.reports import templates
from quant import store
from quant.report import explain
from quant.report.frame import OF_SETS, frame, lines, provenance
from quant.report.plots import draw
from quant.report.section import TEMPLATES
from quant.schemes.registry import installed
from quant.texts import explained


def write(folder: Path) -> dict[str, str]:
    """Write `configs.csv`, `configs.json`, `configs.parquet`, `plots/*.png` and `report.html` into
    the folder of results; return their paths by kind."""
    results = store.read_all(folder)
    rows = frame(results)
    plots = draw(results, folder / "plots")
    sets = any(OF_SETS[0] in result.summary for result in results)
    head, *table = lines(results, sets)
    page = (
        templates(TEMPLATES)
        .get_template("report.html")
        .render(
            checkpoints=dict.fromkeys(result.checkpoint for result in results),
            texts=dict.fromkeys(explained(**result.texts) for result in results),
            images={
                name: base64.b64encode(path.read_bytes()).decode() for name, path in plots.items()
            },
            outliers=explain.explanations(results),
            head=head,
            rows=table,
            **provenance(results),
        )
    )
    written = {"csv": "configs.csv", "json": "configs.json", "html": "report.html"}
    write_text(folder / written["csv"], rows.to_csv(index=False))
    write_text(folder / written["json"], rows.to_json(orient="records", indent=1) + "\n")
    write_text(folder / written["html"], page)
    if installed("pyarrow"):
        written["parquet"] = "configs.parquet"
        with replacing(folder / written["parquet"]) as temporary:
            rows.to_parquet(temporary)
    return {kind: str(folder / name) for kind, name in written.items()} | {
        f"plot {name}": str(path) for name, path in plots.items()
    }
