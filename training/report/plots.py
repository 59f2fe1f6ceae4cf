"""The report's figures, as PNG files that are the same for the same results."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from attnserve.budgets import plot as budgets_plot
from attnserve.evaluation.intervals import mean_interval
from attnserve.reports import COLORS, color, save_figure
from training.analyze.length import BINS
from training.report.evidence import Evidence

if TYPE_CHECKING:
    from matplotlib.axes import Axes

SMOOTHED = 50
"""Training steps that a point of the training curves averages."""


def training(evidence: Evidence) -> Figure | None:
    """Draw the training loss against steps."""
    if not evidence.curves:
        return None
    figure, (axes,) = canvas(1)
    for name, curve in sorted(evidence.curves.items(), key=lambda pair: pair[0] != "softmax"):
        smooth = curve["loss"].rolling(SMOOTHED, min_periods=SMOOTHED).mean()
        axes.plot(curve["step"], smooth, label=name, color=shade(evidence, name), linewidth=1)
    axes.set(
        xlabel="step", ylabel="training loss, nats per token", title=f"mean of {SMOOTHED} steps"
    )
    axes.set_ylim(top=axes.get_ylim()[0] + 1.5)
    axes.legend()
    return figure


def length(evidence: Evidence) -> Figure | None:
    """Draw the loss against position, one panel a factor of RoPE's theta."""
    factors = evidence.factors("length")
    if not factors:
        return None
    figure, panels = canvas(len(factors))
    for factor, axes in zip(factors, panels, strict=True):
        for name, found in evidence.of("length", factor).items():
            bins = np.asarray(found.result.units["windows"])
            spans = list(itertools.pairwise(edges(bins.shape[1])))
            means = [mean_interval(bins[:, start:end].mean(1)) for start, end in spans]
            places = [(start + end) / 2 / BINS for start, end in spans]
            values, low, high = (np.array(column) for column in zip(*means, strict=True))
            axes.plot(places, values, label=name, color=shade(evidence, name), marker=".")
            axes.fill_between(places, low, high, color=shade(evidence, name), alpha=0.1)
        axes.axvline(1, color="gray", linestyle=":", linewidth=1)
        axes.set_xscale("log", base=2)
        axes.set(
            xlabel="position, training lengths",
            ylabel="loss, nats per token",
            title="RoPE as trained" if factor == 1 else f"RoPE's theta x{factor:g}",
        )
    panels[0].legend()
    return figure


def edges(count: int) -> list[int]:
    """Return ends of spans of bins that widen with the distance from the start: 0, 1, 2, 3, 4, 6,
    8, 12, 16, ... `count`. At far positions there are enough tokens to be averaged."""
    powers = [2**power for power in range(2, count.bit_length())]
    wide = [end for power in powers for end in (power, power * 3 // 2)]
    return [0, 1, 2, 3, *(end for end in wide if end < count), count]


def attention(evidence: Evidence) -> Figure | None:
    """Draw bars of sink rate, kurtosis and zeros."""
    found = evidence.of("attention")
    if not found:
        return None
    figures = ("sink rate at 0.3", "kurtosis", "zeros")
    figure, panels = canvas(len(figures))
    for key, axes in zip(figures, panels, strict=True):
        for name, stored in found.items():
            value, low, high = stored.result.summary[key]
            error = [[max(0.0, value - low)], [max(0.0, high - value)]]
            axes.bar(name, value, yerr=error, color=shade(evidence, name), capsize=3)
        axes.set_title({"zeros": "share of exact zeros"}.get(key, key))
        axes.tick_params(axis="x", rotation=45)
    return figure


def passkey(evidence: Evidence) -> Figure | None:
    """Draw the key's gain and the accuracy against length."""
    factors = evidence.factors("passkey")
    if not factors:
        return None
    figure, panels = canvas(2)
    for factor in factors:
        for name, found in evidence.of("passkey", factor).items():
            for what, axes in zip(("gain", "accuracy"), panels, strict=True):
                multiples = [int(multiple) for multiple in found.result.units]
                means = [found.result.summary[f"{what} at {m}x"] for m in multiples]
                values, low, high = (np.array(column) for column in zip(*means, strict=True))
                theta = "" if factor == 1 else f", theta x{factor:g}"
                axes.errorbar(
                    multiples,
                    values,
                    yerr=(values - low, high - values),
                    label=name + theta,
                    color=shade(evidence, name),
                    linestyle="-" if factor == 1 else ":",
                    capsize=3,
                )
    panels[0].set_ylabel("gain of the planted key, nats")
    panels[1].set_ylabel("accuracy")
    for axes in panels:
        axes.set_xscale("log", base=2)
        axes.set_xlabel("length of the prompt, training lengths")
    panels[0].legend()
    return figure


LINES = (
    # result, rule, searched for each layer, label, color, kept tokens at the label, its offset
    ("selective", "streaming", False, "softmax + StreamingLLM", "tab:gray", 24, (-150, -11)),
    ("selective", "heavy hitters", False, "softmax + H2O", "tab:blue", 16, (10, 2)),
    ("selective", "selective", True, "selective", "tab:orange", 64, (0, -15)),
    ("selective_prunable", "selective", True, "selective, trained to prune", "tab:red", 16, (6, 7)),
)


def kv_cache(evidence: Evidence) -> Figure | None:
    """Draw perplexity against the tokens kept, in one panel with labels on its lines: the README's
    figure, of the checkpoints of 512 tokens."""
    results = evidence.pruning
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
    for name, rule, searched, label, shade, kept, offset in LINES:
        points = {
            sum(row.budgets) / len(row.budgets): row.loss.exp().value
            for row in results[name].rows
            if row.rule == rule and (row.choice == "uniform") != searched
        }
        x = sorted(points)
        axes.plot(x, [points[tokens] for tokens in x], color=shade, marker="o", markersize=4)
        axes.annotate(label, (kept, points[kept]), offset, textcoords="offset points", color=shade)
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


PLOTS: dict[str, Callable[[Evidence], Figure | None]] = {
    "training": training,
    "length": length,
    "attention": attention,
    "passkey": passkey,
    "pruning": lambda e: budgets_plot.draw(list(e.pruning.values())) if e.pruning else None,
    "kv_cache": kv_cache,
}


def shade(evidence: Evidence, name: str) -> str:
    """Return a checkpoint's color: that of its name among the reference checkpoints, and by its
    place where none of them is there."""
    others = [one for one in evidence.names if one != evidence.control]
    if name == evidence.control:
        return color("softmax")
    return color(name) if COLORS.keys() & set(others) else f"C{others.index(name) % 10}"


def canvas(panels: int) -> tuple[Figure, list[Axes]]:
    """Return a figure with panels side by side."""
    figure = Figure(figsize=(6 if panels == 1 else 4.5 * panels, 4), layout="constrained")
    return figure, list(figure.subplots(1, panels, squeeze=False)[0])


def draw(evidence: Evidence, folder: Path) -> list[str]:
    """Draw what there is evidence for; return the names of the files."""
    drawn = []
    for name, plot in PLOTS.items():
        # The README shows the last one alone, 800 pixels wide.
        with matplotlib.rc_context({"font.size": 11 if name == "kv_cache" else 9}):
            figure = plot(evidence)
            if figure is not None:
                save_figure(figure, folder / f"{name}.png")
                drawn.append(name)
    return drawn
