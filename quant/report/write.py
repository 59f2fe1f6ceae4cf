"""Every output of a sweep, from the folder of its results alone."""

import math
from pathlib import Path

from markupsafe import Markup

from attnserve.evaluation.intervals import Estimate
from attnserve.files import replacing, write_text
from attnserve.reports import templates
from quant import store
from quant.config import UNQUANTIZED
from quant.report import explain
from quant.report.compare import LEVEL, Answers, signed, what
from quant.report.figures import draw, questions, svg
from quant.report.frame import OF_SETS, frame, lines, provenance
from quant.report.section import TEMPLATES
from quant.schemes.registry import installed
from quant.store import SweepResult
from quant.texts import explained

STEPS = (0.005, 0.02, 0.1)
"""Changes of loss, in nats, at which the main table's color changes."""


def level(change: Estimate) -> str:
    """Return the class of a change of loss in the main table, which gives it its color."""
    if not math.isfinite(change.value):
        return f"step{len(STEPS)}"
    if change.low <= 0 <= change.high:
        return "none"
    return f"step{sum(change.value >= step for step in STEPS)}"


def memory(result: SweepResult, target: str) -> str:
    """Return the memory that few bits of a target save: of a cached token, or of the checkpoint."""
    if target == "kv":
        return f"{result.size['cache_bytes_per_token']} B"
    return f"{result.size['bytes'] / 1e6:.2f} MB"


def write(folder: Path) -> dict[str, str]:
    """Write `configs.csv`, `configs.json`, `configs.parquet`, `plots/*.png` and `report.html` into
    the folder of results; return their paths by kind."""
    results = store.read_all(folder)
    rows, answers = frame(results), Answers.of(results)
    plots = draw(questions(answers), folder / "plots")
    written = {"csv": "configs.csv", "json": "configs.json", "html": "report.html"}
    write_text(folder / written["csv"], rows.to_csv(index=False))
    write_text(folder / written["json"], rows.to_json(orient="records", indent=1) + "\n")
    write_text(folder / written["html"], page(answers))
    if installed("pyarrow"):
        written["parquet"] = "configs.parquet"
        with replacing(folder / written["parquet"]) as temporary:
            rows.to_parquet(temporary)
    return {kind: str(folder / name) for kind, name in written.items()} | {
        f"plot {name}": str(path) for name, path in plots.items()
    }


def page(answers: Answers) -> str:
    """Return the page: the answers first, then a figure for each question, then all details."""
    results = answers.results
    figures = [
        (
            question,
            [(v.name, Markup(svg(v, f"{question.name} {v.name}"))) for v in question.views],
        )
        for question in questions(answers)
    ]
    chosen = {
        target: {choice.bits: choice for choice in answers.choices if choice.target == target}
        for target in answers.targets
    }
    cells = {
        (choice.target, choice.bits, result.checkpoint): result
        for choice in answers.choices
        for result in choice.results
    }
    head, *table = lines(results, any(OF_SETS[0] in result.summary for result in results))
    every = [
        [
            what(e.target),
            e.bits,
            e.measure,
            f"{e.first} - {e.second}",
            signed(e.rise),
            f"{e.chance:.2g}",
        ]
        for e in answers.differences
    ]
    return (
        templates(TEMPLATES)
        .get_template("report.html")
        .render(
            answers=answers,
            what=what,
            widths=sorted({choice.bits for choice in answers.choices}, reverse=True),
            chosen=chosen,
            cells=cells,
            level=level,
            memory=memory,
            unquantized=[result for result in results if result.config == UNQUANTIZED],
            steps=STEPS,
            limit=LEVEL,
            figures=figures,
            every=every,
            texts=dict.fromkeys(explained(**result.texts) for result in results),
            outliers=explain.explanations(results),
            head=head,
            rows=table,
            **provenance(results),
        )
    )
