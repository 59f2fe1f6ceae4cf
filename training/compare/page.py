"""The page of a comparison, from what was measured."""

from __future__ import annotations

from pathlib import Path

from attnserve.evaluation.checkpoint import digest
from attnserve.files import write_text
from attnserve.reports import table
from quant.report.section import drawn_section
from training.compare.stages import Comparison, served_rows
from training.report.changes import changes
from training.report.document import page
from training.report.evidence import Evidence
from training.report.plots import draw

PAGE, FIGURES = "page.md", "figures"


def write(
    c: Comparison, seen: str, quick: bool, command: str
) -> tuple[Path, dict[str, dict[str, str]]]:
    """Write the page with its figures, what is known of whether the text was `seen`, and the
    command that measured it; return its file, and each model's verdicts."""
    figures = c.out / FIGURES
    figures.mkdir(parents=True, exist_ok=True)
    evidence = Evidence(
        results={(s.checkpoint, s.measure, s.rope_theta_factor, s.engine): s for s in c.results},
        curves={},
        rates=None,
        pruning=c.budgets,
        long_context=None,
        quantization=c.quantization,
        control=c.original.name,
    )
    plots = draw(evidence, figures)
    quantization = "## Quantization\n\nNot measured."
    if c.quantization:
        quantization = drawn_section(c.quantization, figures, FIGURES)
    sets = "no evaluation sets"
    if c.data.evaluation is not None:
        sets = f"the evaluation sets of `{c.data.evaluation.resolve().name}` (LAMBADA, BLiMP)"
    name = c.text.name
    about = {
        "converted": {one.name: one.variant for one in c.converted},
        "text": f"`{name}` (SHA-256 {digest(c.text)}...)",
        "sets": sets,
        "seen": seen,
        "quick": quick,
        "failures": c.failures,
        "left_out": c.left_out,
        "texts": {
            "held_out": f"Test is {name} from its beginning, in sequences of {c.sequence} tokens "
            "that start anew.",
            "test": name,
            "searched": f"the first half of {name}",
            "compared": "its second half",
        },
        "served": served(c),
        "serving": f"{c.effort.requests} requests at once, of which as many run as the KV cache "
        "has room for.",
        "command": command,
    }
    write_text(c.out / PAGE, page(evidence, about, plots, FIGURES, quantization))
    return c.out / PAGE, {
        own.name: {one.what: one.verdict for one in changes(evidence, own.name)}
        for own in c.converted
    }


def served(c: Comparison) -> str:
    """Return the served models' table; empty without any."""
    header = ["pair", "server", "KV cache, MB", "in flight", "tokens/s", "TTFT ms", "TPOT ms"]
    rows = served_rows(c)
    return table(header, rows, left=2) if rows else ""
