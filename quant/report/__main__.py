"""Write tables, plots and an HTML page again from the results of `quant.sweep`."""

import json
from pathlib import Path
from typing import Annotated

import typer

from attnserve.command import AsJson, expanded, main, needs
from quant import options


@needs("quant")
def report(
    results: Annotated[
        Path,
        typer.Option(
            metavar="DIR", help="Folder that quant.sweep wrote; what is written goes there too."
        ),
    ] = options.OUT,
    as_json: AsJson = False,
) -> None:
    """Write CSV, JSON, parquet, plots and an HTML page again from the results of `quant.sweep`."""
    from quant import store
    from quant.report.frame import table
    from quant.report.write import write

    folder = expanded(results)
    found = store.read_all(folder)
    written = write(folder)
    if as_json:
        print(json.dumps({"configs": len(found), "written": written}))
        return
    print(table(found))
    print(f"Report: {written['html']}")


if __name__ == "__main__":
    main(report, "python -m quant.report")
