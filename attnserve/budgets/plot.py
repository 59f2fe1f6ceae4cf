"""Perplexity against memory, as a figure."""

from collections.abc import Sequence
from itertools import groupby

from matplotlib.figure import Figure

from attnserve.budgets.result import Found, Row

LOOKS = {
    ("selective", "searched"): ("budgets searched, most masked goes", "tab:purple", "-"),
    ("selective", "uniform"): ("most masked goes", "tab:purple", "--"),
    ("recent", "uniform"): ("first + most recent stay", "tab:orange", "--"),
    ("random", "uniform"): ("random", "tab:gray", "--"),
    ("streaming", "uniform"): ("StreamingLLM", "black", "--"),
    ("heavy hitters", "uniform"): ("H2O", "tab:blue", "--"),
}


def draw(results: Sequence[Found]) -> Figure:
    """Draw a panel for each result: perplexity on the test text against tokens kept per layer."""
    figure = Figure(figsize=(6.5 * len(results), 4.5), layout="constrained")
    panels = figure.subplots(1, len(results), squeeze=False, sharey=True)[0]
    for found, axes in zip(results, panels, strict=True):

        def kind(row: Row) -> tuple[str, str]:
            return row.rule, "uniform" if row.choice == "uniform" else "searched"

        for row in found.rows:
            if row.rule == "none":
                own = row.model == found.about["checkpoint"]
                axes.axhline(
                    row.loss.exp().value,
                    label=f"{row.model}, unpruned",
                    color="tab:purple" if own else "black",
                    linestyle=":",
                    linewidth=1,
                )
        kept = sorted((row for row in found.rows if row.rule != "none"), key=kind)
        for key, group in groupby(kept, kind):
            rows = sorted(group, key=lambda row: sum(row.budgets))
            name, color, style = LOOKS[key]
            perplexities = [row.loss.exp() for row in rows]
            tokens = [sum(row.budgets) / len(row.budgets) for row in rows]
            axes.plot(
                tokens,
                [p.value for p in perplexities],
                label=f"{rows[0].model}: {name}",
                color=color,
                linestyle=style,
                marker=".",
            )
        unpruned = [row.loss.exp().value for row in found.rows if row.rule == "none"]
        axes.set_xscale("log", base=2)
        axes.set_ylim(0.97 * min(unpruned), 1.15 * max(unpruned))
        axes.set(
            xlabel=f"tokens kept per layer, mean of the layers (of {found.length})",
            ylabel="perplexity per token, test text",
            title=found.about["checkpoint"],
        )
        axes.grid(alpha=0.3)
        axes.legend(fontsize="small")
    return figure
