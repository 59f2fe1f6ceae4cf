"""The text of docs/RESULTS.md, from `results.md.j2`."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from attn_kernels import variant_names
from attnserve.budgets.eviction import SINKS
from attnserve.reports import Verdict, templates
from training.analyze.store import Stored
from training.report import tables
from training.report.claims import PAPERS
from training.report.evidence import Evidence
from training.report.figures import SEED_NOISE


def document(
    evidence: Evidence, plots: Sequence[str], plot_folder: str, quantization: str = ""
) -> str:
    """Return the whole text, with the plots that were drawn (names of PNG files) in `plot_folder`,
    as seen from the document, and the section of `quant.report`."""
    stored = evidence.results.values()
    analyzed = {one.checkpoint for one in stored}
    text = (
        templates(Path(__file__).parent)
        .get_template("results.md.j2")
        .render(
            evidence=evidence,
            tables=tables,
            papers=PAPERS,
            verdict=Verdict,
            seed_noise=SEED_NOISE,
            sinks=SINKS,
            plots=plots,
            folder=plot_folder,
            quantization=quantization,
            absent=[name for name in variant_names() if name not in evidence.names],
            unmeasured=[name for name in evidence.curves if name not in analyzed],
            dead=[
                f"{name} {found.result.units['dead_heads']} of {found.result.units['heads']}"
                for name, found in evidence.of("attention").items()
            ],
            sizes=sizes(list(stored)),
            machines=sorted({one.machine for one in stored}),
        )
    )
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def sizes(stored: Sequence[Stored]) -> list[str]:
    """Return the settings of each measure; several where they differ."""
    found: dict[str, set[str]] = {}
    for one in stored:
        settings = ", ".join(f"{name} {value}" for name, value in one.key["settings"].items())
        found.setdefault(one.measure, set()).add(settings)
    return [f"{measure}: {' or '.join(sorted(found[measure]))}" for measure in sorted(found)]
