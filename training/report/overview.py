"""The README's figure: perplexity against the tokens kept, one panel, with labels on its lines."""

from __future__ import annotations

from collections.abc import Mapping

from matplotlib.figure import Figure

from attnserve.budgets.result import Found

LINES = (
    # result, rule, searched for each layer, label, color, kept tokens at the label, its offset
    ("selective", "streaming", False, "softmax + StreamingLLM", "tab:gray", 24, (-150, -11)),
    ("selective", "heavy hitters", False, "softmax + H2O", "tab:blue", 16, (10, 2)),
    ("selective", "selective", True, "selective", "tab:orange", 64, (0, -15)),
    ("selective_prunable", "selective", True, "selective, trained to prune", "tab:red", 16, (6, 7)),
)


def overview(results: Mapping[str, Found]) -> Figure | None:
    """Draw the checkpoints of 512 tokens; None where they were not measured."""
    if not {line[0] for line in LINES} <= set(results):
        return None
    figure = Figure(figsize=(7.2, 3.8), layout="constrained")
    axes = figure.subplots()
    (softmax,) = (
        row for row in results["selective"].rows if row.model == "softmax" and row.rule == "none"
    )
    whole = softmax.loss.exp().value
    axes.axhline(whole, color="black", linestyle=":", linewidth=1)
    axes.annotate(
        "softmax, all 512 tokens kept",
        (256, whole),
        (0, -15),
        textcoords="offset points",
        ha="right",
    )
    for name, rule, searched, label, color, kept, offset in LINES:
        points = {
            sum(row.budgets) / len(row.budgets): row.loss.exp().value
            for row in results[name].rows
            if row.rule == rule and (row.choice == "uniform") != searched
        }
        x = sorted(points)
        axes.plot(x, [points[tokens] for tokens in x], color=color, marker="o", markersize=4)
        axes.annotate(label, (kept, points[kept]), offset, textcoords="offset points", color=color)
    axes.set_xscale("log", base=2)
    ticks = [8, 16, 32, 64, 128, 256]
    axes.set_xticks(ticks, [str(tick) for tick in ticks])
    axes.set_ylim(39, 52)
    axes.set(
        xlabel="tokens kept in the KV cache, mean of the layers", ylabel="perplexity per token"
    )
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.25)
    return figure
