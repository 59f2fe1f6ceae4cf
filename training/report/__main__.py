"""Write docs/RESULTS.md and its figures from what `training.analyze` and others have measured."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Annotated

from typer import Option

from attnserve.command import AsJson, main, needs
from attnserve.errors import UserError
from attnserve.files import CHECKOUT, write_text

DOCS = CHECKOUT / "docs"


@needs("train")
def report(
    results: Annotated[Path, Option(help="Folder like training/results.")] = (
        CHECKOUT / "training" / "results"
    ),
    checkpoints: Annotated[Path, Option(help="Folder of checkpoints with their loss.csv.")] = (
        CHECKOUT / "checkpoints"
    ),
    quantization: Annotated[Path, Option(help="Folder that quant.sweep wrote.")] = (
        CHECKOUT / "quant" / "results"
    ),
    out: Annotated[Path, Option(help="The document.")] = DOCS / "RESULTS.md",
    figures: Annotated[Path, Option(help="Folder of the PNG files.")] = DOCS / "results",
    as_json: AsJson = False,
) -> None:
    """Write docs/RESULTS.md and its figures from what `training.analyze` and others have measured.

    It takes whatever results there are and names the rest.
    """
    import pandas as pd

    from quant.report.section import write_section
    from training.report.claims import PAPERS
    from training.report.document import document
    from training.report.evidence import load
    from training.report.plots import draw

    for folder in (results, checkpoints):
        if folder.exists() and not folder.is_dir():
            raise UserError(f"{folder} is not a folder")
    figures.mkdir(parents=True, exist_ok=True)
    evidence = load(results, checkpoints, quantization)
    plots = draw(evidence, figures)
    seen = Path(os.path.relpath(figures, out.parent)).as_posix()
    section = write_section(quantization, figures, seen)
    write_text(out, document(evidence, plots, seen, section))
    verdicts: dict[str, dict[str, str]] = {
        paper.title: {
            claim.text: str(claim.judge(evidence, paper.variant).verdict) for claim in paper.claims
        }
        for paper in PAPERS
    }
    if as_json:
        print(json.dumps({"out": str(out), "figures": plots, "verdicts": verdicts}))
        return
    rows = [(paper, *pair) for paper, claims in verdicts.items() for pair in claims.items()]
    shown = pd.DataFrame(rows, columns=["paper", "claim", "verdict"])
    print(shown.to_string(index=False, justify="left"))


if __name__ == "__main__":
    main(report, "python -m training.report")
