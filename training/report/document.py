"""The text of docs/RESULTS.md, from `results.md.j2`, and of a comparison's page, from
`page.md.j2`."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from attn_kernels import variant_names
from attnserve.budgets.eviction import SINKS
from attnserve.reports import Verdict, templates
from training.analyze.store import Stored
from training.report import tables
from training.report.claims import PAPERS
from training.report.evidence import Evidence
from training.report.figures import SEED_NOISE

NOVELS = {
    "held_out": "Validation is *Emma*, test *Great Expectations*, each from its beginning; "
    "WikiText-2 is the test text. Sequences have the training length and start anew.",
    "test": "the test book",
    "searched": "*Emma*",
    "compared": "*Great Expectations*",
}
"""What the texts of the reference checkpoints' results are called."""


def document(
    evidence: Evidence, plots: Sequence[str], plot_folder: str, quantization: str = ""
) -> str:
    """Return the whole text, with the plots that were drawn (names of PNG files) in `plot_folder`,
    as seen from the document, and the section of `quant.report`."""
    analyzed = {one.checkpoint for one in evidence.results.values()}
    return _rendered(
        "results.md.j2",
        evidence,
        plots,
        plot_folder,
        quantization,
        papers=PAPERS,
        texts=NOVELS,
        absent=[name for name in variant_names() if name not in evidence.names],
        unmeasured=[name for name in evidence.curves if name not in analyzed],
    )


def page(
    evidence: Evidence,
    about: Mapping[str, Any],
    plots: Sequence[str],
    plot_folder: str,
    quantization: str,
) -> str:
    """Return the page of converted models beside their original, `evidence.control`.

    Args:
        evidence: all results.
        about: `converted`, the checkpoints' variants by name, and what the page says of the run.
        plots, plot_folder, quantization: as for `document`.
    """
    papers = {
        name: [paper for paper in PAPERS if paper.variant == variant]
        for name, variant in about["converted"].items()
    }
    return _rendered(
        "page.md.j2", evidence, plots, plot_folder, quantization, papers=papers, **about
    )


def _rendered(
    template: str,
    evidence: Evidence,
    plots: Sequence[str],
    plot_folder: str,
    quantization: str,
    **more: Any,
) -> str:
    stored = list(evidence.results.values())
    text = (
        templates(Path(__file__).parent)
        .get_template(template)
        .render(
            evidence=evidence,
            tables=tables,
            verdict=Verdict,
            seed_noise=SEED_NOISE,
            sinks=SINKS,
            plots=plots,
            folder=plot_folder,
            quantization=quantization,
            dead=[
                f"{name} {found.result.units['dead_heads']} of {found.result.units['heads']}"
                for name, found in evidence.of("attention").items()
            ],
            sizes=sizes(stored),
            machines=sorted({one.machine for one in stored}),
            **more,
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
