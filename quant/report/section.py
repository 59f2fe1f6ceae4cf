"""The section on quantization of docs/RESULTS.md."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import pandas as pd

from attnserve.evaluation.intervals import Estimate
from attnserve.reports import templates
from quant import store
from quant.config import UNQUANTIZED
from quant.report import explain, paper
from quant.report.compare import Answers
from quant.report.figures import draw, questions
from quant.report.frame import provenance, setting, shown, text_of
from quant.scorer import CHANGES, DIVERGENCES
from quant.store import SweepResult

TEMPLATES = Path(__file__).parent / "templates"
METRICS = {
    "test KL": "KL divergence to the unquantized model, nats per token",
    "test loss change": "Perplexity, as a multiple of the unquantized model's",
    "test top-1": "Tokens with the same likeliest token as the unquantized model, %",
}


def write_section(folder: Path, figures: Path, plot_folder: str) -> str:
    """Draw the plots into `figures`, which is `plot_folder` as seen from the document, and
    return the section; a line that says so if there are no results."""
    if not any(folder.glob("configs/*/*.json")):
        return "## Quantization\n\nNot measured: `python -m quant.sweep checkpoints/*`."
    return drawn_section(store.read_all(folder), figures, plot_folder)


def drawn_section(results: Sequence[SweepResult], figures: Path, plot_folder: str) -> str:
    """Draw the plots of results, in the order of tables, as `write_section`; return the section."""
    asked = questions(Answers.of(results))
    if len({result.checkpoint for result in results}) < explain.FEWEST:
        asked = [question for question in asked if question.name != "outliers"]
    plots = draw(asked, figures, prefix="quantization-")
    return section(results, {q.title: f"{plot_folder}/{plots[q.name].name}" for q in asked})


def section(results: Sequence[SweepResult], plots: Mapping[str, str]) -> str:
    """Return the section as Markdown, with figures: the paths of their files by title."""
    unquantized = [result for result in results if result.config == UNQUANTIZED]
    statistics, explanations = explain.statistics(unquantized), explain.explanations(results)
    values, answers = np.array(list(statistics.values())).T, Answers.of(results)
    rows = [
        [result.checkpoint, *(f"{value:.2f}" for value in own)]
        for result, own in zip(unquantized, values, strict=True)
    ]
    template = templates(TEMPLATES).get_template("section.md")
    text = template.render(
        results=results,
        text=text_of(results),
        paper=paper.table(results),
        metrics=[(title, *by_checkpoint(results, name)) for name, title in METRICS.items()],
        spread=spread(answers),
        answers=answers,
        plots=plots,
        variants={result.variant for result in results},
        outliers=[["", *statistics], *rows],
        in_short=explain.in_short(explanations),
        explanations=explanations,
        level=explain.LEVEL,
        fewest=explain.FEWEST,
        statistics_only=len(unquantized) < explain.FEWEST,
        hashes={result.checkpoint: result.key["checkpoint"] for result in results},
        **provenance(results),
    )
    return text.rstrip("\n")


def by_checkpoint(results: Sequence[SweepResult], metric: str) -> tuple[list[str], list[list[str]]]:
    """Return the header and rows of a metric: a row a config, a column a checkpoint."""

    def text(estimate: Estimate | None) -> str:
        if estimate is None or metric == "test KL":
            return shown(estimate)
        if metric == "test top-1":
            return shown(estimate, 1, 100.0)
        # Of large changes the digits behind the point say nothing.
        ratio = estimate.exp()
        return ratio.shown(4 if ratio.value < 2 else 1)

    names = list(dict.fromkeys(result.checkpoint for result in results))
    cells = pd.DataFrame(
        (c.target, setting(c), c.bits, result.checkpoint, text(result.summary.get(metric)))
        for result in results
        if (c := result.config) != UNQUANTIZED
    )
    if cells.empty:
        return ["target", "how", "bits", *names], []
    rows = cells.pivot(index=[0, 1, 2], columns=3, values=4).fillna("")[names].reset_index()
    return ["target", "how", "bits", *names], rows.astype(str).to_numpy().tolist()


def spread(answers: Answers) -> tuple[list[str], list[list[str]]]:
    """Return how far single tokens are off with the settings to take for weights, as llama.cpp's
    perplexity tool shows it; `configs.csv` has all."""
    rows = []
    chosen = [choice for choice in answers.choices if choice.target == "weights"]
    for result in sorted((r for c in chosen for r in c.results), key=lambda result: result.order):
        details = result.details
        if "p change over tokens" not in details:
            continue
        divergence, change = (details[f"{of} over tokens"]["test"] for of in ("KL", "p change"))
        rows.append(
            [
                result.checkpoint,
                str(result.config.bits),
                *(f"{divergence[name]:.2g}" for name in DIVERGENCES),
                *(f"{100 * change[name]:+.2f}" for name in CHANGES),
                result.summary["test p change, RMS"].shown(2, 100.0),
            ]
        )
    names = [*(f"KL, {name}" for name in DIVERGENCES), *(f"p, {name}" for name in CHANGES)]
    return ["", "bits", *names, "p, RMS"], rows
