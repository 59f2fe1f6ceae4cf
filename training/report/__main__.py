"""Write docs/RESULTS.md and its figures from what `training.analyze` and others have measured.

Takes whatever results there are and names the rest.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from pathlib import Path

from attnserve.budgets.result import FOLDER as BUDGETS
from attnserve.files import CHECKOUT
from attnserve.reports import table
from quant.report.section import write_section
from quant.store import FOLDER as QUANTIZATION
from training.analyze.store import FOLDER
from training.long_context import CSV as LONG_CONTEXT
from training.report.claims import PAPERS
from training.report.document import document, write
from training.report.evidence import load
from training.report.plots import draw


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m training.report",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )

    def add(name: str, default: Path, text: str) -> None:
        parser.add_argument(name, type=Path, default=default, help=text + " (default: %(default)s)")

    add("--results", FOLDER, "folder that training.analyze wrote")
    add("--checkpoints", CHECKOUT / "checkpoints", "folder of checkpoints with their loss.csv")
    add(
        "--learning-rates",
        CHECKOUT / "training" / "results" / "learning_rate.csv",
        "table of training.learning_rate",
    )
    add("--budgets", BUDGETS, "folder that attnserve.budgets wrote")
    add("--long-context", LONG_CONTEXT, "table of training.long_context")
    add("--quantization", QUANTIZATION, "folder that quant.sweep wrote")
    add("--out", CHECKOUT / "docs" / "RESULTS.md", "the document")
    add("--figures", CHECKOUT / "docs" / "results", "folder of the PNG files")
    options = parser.parse_args(argv)
    for folder in (options.results, options.checkpoints):
        if folder.exists() and not folder.is_dir():
            parser.error(f"{folder} is not a folder")
    try:
        evidence = load(
            options.results,
            options.checkpoints,
            options.learning_rates,
            options.budgets,
            options.long_context,
        )
    except ValueError as error:
        parser.error(str(error))
    plots = draw(evidence, options.figures)
    folder = Path(os.path.relpath(options.figures, options.out.parent)).as_posix()
    try:
        quantization = write_section(options.quantization, options.figures, folder)
    except ValueError as error:
        parser.error(str(error))
    write(document(evidence, plots, folder, quantization), options.out)
    findings = [(p, c, c.judge(evidence)) for p in PAPERS for c in p.claims]
    rows = [[p.title.partition(" (")[0], c.text, str(f.verdict)] for p, c, f in findings]
    print(table(["paper", "claim", "verdict"], rows, left=3))
    verdicts: dict[str, dict[str, str]] = {}
    for p, c, f in findings:
        verdicts.setdefault(p.title, {})[c.text] = str(f.verdict)
    print(json.dumps({"out": str(options.out), "figures": plots, "verdicts": verdicts}))


if __name__ == "__main__":
    main()
