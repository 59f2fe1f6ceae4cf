"""Write CSV, JSON, parquet, plots and an HTML page again from the results of `quant.sweep`."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from quant import store
from quant.report.frame import table
from quant.report.write import write


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m quant.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--results",
        type=Path,
        default=store.OUT,
        help="folder that quant.sweep wrote; everything goes there (default: %(default)s)",
    )
    options = parser.parse_args(argv)
    try:
        results = store.read_all(options.results)
    except ValueError as error:
        print(f"{parser.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    written = write(options.results)
    print(table(results))
    print(json.dumps({"configs": len(results), "written": written}))


if __name__ == "__main__":
    main()
