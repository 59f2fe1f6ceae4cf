"""The sweep's figures, one for each question: PNG files for documents, SVG for the page.

In the page a figure takes the colors of the text around it, and its points tell their values.
"""

import io
import itertools
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib import ticker
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from scipy.optimize import isotonic_regression

from attnserve.evaluation.intervals import Estimate
from attnserve.reports import color, save_figure
from quant.config import FP8, UNQUANTIZED, QuantConfig
from quant.outliers import FIGURES
from quant.report import explain
from quant.report.compare import Answers, mean_divergence, signed, what
from quant.report.frame import setting
from quant.store import SweepResult

WIDTH, HEIGHT = 9.0, 3.8  # inches of a view
FEW = 3  # views of a question that a PNG file shows
TEXT, RULE = "#000001", "#808081"
"""Stand for the page's colors of text and rules; nothing else in a figure has them."""
STYLE: dict[Any, Any] = {
    "font.size": 10,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "grid.color": RULE,
    "svg.fonttype": "none",
    "text.parse_math": False,
    "text.color": TEXT,
    "axes.edgecolor": TEXT,
    "axes.labelcolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
}
BARS = "Bars are 95 % intervals over sequences."
DECIMALS = ticker.FuncFormatter(lambda x, _: np.format_float_positional(x, 6, trim="-"))
SHADES = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown", "tab:pink")


@dataclass(frozen=True)
class Line:
    """A labelled line: x, an estimate, and what is said of it for each point."""

    label: str
    shade: str
    points: list[tuple[float, Estimate, str]]


@dataclass(frozen=True)
class View:
    """Panels side by side; the reader of the page picks one view of a question."""

    name: str
    panels: int
    draw: Callable[[Sequence[Axes]], None]


@dataclass(frozen=True)
class Question:
    """A figure, and the question that it answers."""

    name: str  # of its file
    title: str
    reading: str  # how to read it
    views: list[View]


def shade_of(variant: str) -> str:
    """Return a variant's color; that of text for black."""
    return TEXT if color(variant) == "black" else color(variant)


def panel(axes: Axes, lines: Sequence[Line], x: str, y: str) -> None:
    """Draw labelled lines with intervals, against what falls from left to right. Points without a
    finite value are left to the tables."""
    finite = [[point for point in line.points if np.isfinite(point[1].value)] for line in lines]
    lines = [replace(line, points=own) for line, own in zip(lines, finite, strict=True) if own]
    axes.set(xlabel=x, ylabel=y)
    if not lines:
        axes.text(0.5, 0.5, "no finite values", transform=axes.transAxes, ha="center")
        return
    for line in lines:
        across, ends, _ = zip(*line.points, strict=True)
        values = np.array(ends)
        bars = np.where(np.isfinite(values), values, values[:, :1])
        axes.plot(across, values[:, 0], color=line.shade, gid=f"of:{line.label}")
        axes.vlines(across, *bars[:, 1:].T, color=line.shade, gid=f"of:{line.label}")
        for place, estimate, said in line.points:
            tip = f"tip:{line.label}: {said}"
            axes.plot([place], [estimate.value], "o", color=line.shade, markersize=5, gid=tip)
    axes.margins(x=0.06)
    axes.xaxis.set_inverted(True)
    set_scale(axes, [estimate.value for line in lines for _, estimate, _ in line.points])
    label_lines(axes, lines)


def whole_bits(axes: Axes, lines: Sequence[Line], bits: Iterable[int]) -> list[Line]:
    """Give an axis a tick for each number of bits, at equal distances; return the lines so placed,
    each a little beside the others."""
    ticks = sorted(set(bits))
    axes.set_xticks(range(len(ticks)), list(map(str, ticks)))
    axes.set_xlim(-0.4, len(ticks) - 0.6)
    step = min(0.07, 0.4 / len(lines))
    return [
        replace(
            line,
            points=[
                (ticks.index(int(x)) - step * (place - (len(lines) - 1) / 2), estimate, said)
                for x, estimate, said in line.points
            ],
        )
        for place, line in enumerate(lines)
    ]


def set_scale(axes: Axes, values: Sequence[float]) -> None:
    """Make the y axis logarithmic where values lie far apart, about 0 where some are negative."""
    sizes = np.abs(values)
    small, positive = max(sizes.min(), 1e-9), min(values) > 0
    if sizes.max() > 10 * small:
        # Changes below a thousandth of a nat are not worth more room.
        axes.set_yscale("log") if positive else axes.set_yscale("symlog", linthresh=2e-3)
        axes.yaxis.set_minor_formatter(ticker.NullFormatter())
    if not positive:
        axes.axhline(0, color=RULE, linewidth=1)
    axes.yaxis.set_major_formatter(DECIMALS)


def label_lines(axes: Axes, lines: Sequence[Line], beside: bool = False) -> None:
    """Write each line's label beside its end or to the right of the panel, as near to the end's
    height as there is room."""
    ends = [min((place, estimate.value) for place, estimate, _ in line.points) for line in lines]
    axes.autoscale_view()
    across, heights = (axes.transData + axes.transAxes.inverted()).transform(ends).T
    order = np.argsort(heights)
    steps = min(0.085, 1 / len(lines)) * np.arange(len(lines))
    apart = isotonic_regression(np.clip(heights, 0, 1)[order] - steps).x + steps
    apart -= max(0.0, apart[-1] - 1)
    for index, height in zip(order, apart, strict=True):
        left = beside and across[index] > 0.5  # where there is more room
        axes.annotate(
            lines[index].label,
            ends[index],
            ((-7 if left else 7) if beside else 1.06, height),
            textcoords=("offset points" if beside else "axes fraction", "axes fraction"),
            ha="right" if left else "left",
            va="center",
            arrowprops={
                "arrowstyle": "-",
                "color": lines[index].shade,
                "linewidth": 0.8,
                "shrinkA": 1,
                "relpos": (int(left), 0.5),
            },
        )


def told(result: SweepResult) -> str:
    """Return what a point says of a config."""
    config, summary = result.config, result.summary
    parts = [
        f"{config.bits} bits ({setting(config)})",
        f"loss {signed(summary['test loss change'])}",
        f"KL {summary['test KL'].shown(5)}",
        f"{result.size['cache_bytes_per_token']} bytes a cached token"
        if config.target == "kv"
        else f"{result.size['bytes'] / 1e6:.2f} MB",
    ]
    return ", ".join(parts)


def series(config: QuantConfig) -> str:
    """Return the setting, or what formats of caches have in common that follow from their bits."""
    formats = config.target == "kv" and config.kv_format != FP8
    return "8 and 4 bits as served, others simulated" if formats else setting(config)


def by_setting(results: Iterable[SweepResult]) -> dict[str, list[SweepResult]]:
    """Return the results of each setting, with fewer bits first."""
    found: dict[str, list[SweepResult]] = {}
    for result in sorted(results, key=lambda result: result.config.bits or 0):
        found.setdefault(series(result.config), []).append(result)
    return found


def variants(own: Sequence[SweepResult]) -> View:
    """Return divergence and change of loss by bits with one setting, a line a checkpoint."""

    def draw(panels: Sequence[Axes]) -> None:
        bits = [result.config.bits or 0 for result in own]
        metrics = {"test KL": "KL divergence, nats", "test loss change": "change of loss, nats"}
        for axes, (metric, title) in zip(panels, metrics.items(), strict=True):
            lines = []
            for name in dict.fromkeys(result.checkpoint for result in own):
                chosen = [result for result in own if result.checkpoint == name]
                points = [(float(r.config.bits or 0), r.summary[metric], told(r)) for r in chosen]
                lines.append(Line(name, shade_of(chosen[0].variant), points))
            panel(axes, whole_bits(axes, lines, bits), bits_of(own[0].config.target), title)

    return View(series(own[0].config), 2, draw)


def bits_of(target: str) -> str:
    """Return the title of the axis of a target's bits."""
    return f"bits of {what(target.partition('+')[0])}"


def told_apart(settings: Sequence[str]) -> list[str]:
    """Return short labels of settings, which take room from what is drawn: the scheme, and what
    tells it from others of the same scheme."""
    parts = [name.split(", ") for name in settings]
    found = []
    for scheme, *own in parts:
        shared = set.intersection(*(set(others) for first, *others in parts if first == scheme))
        found.append(", ".join([scheme, *(part for part in own if part not in shared)]))
    return found


def schemes(target: str, settings: dict[str, list[SweepResult]]) -> View:
    """Return divergence by bits and change of loss by size, means of the checkpoints, a line a
    setting."""
    labels = told_apart(list(settings))

    def draw(panels: Sequence[Axes]) -> None:
        lines: tuple[list[Line], list[Line]] = ([], [])
        every: list[int] = []
        for place, (label, own) in enumerate(zip(labels, settings.values(), strict=True)):
            points: tuple[list[tuple[float, Estimate, str]], ...] = ([], [])
            for bits in dict.fromkeys(result.config.bits or 0 for result in own):
                same = [result for result in own if result.config.bits == bits]
                kl = mean_divergence(same, "test")
                change = float(np.mean([r.summary["test loss change"].value for r in same]))
                size = float(np.mean([r.size["bytes"] for r in same])) / 1e6
                said = f"{bits} bits, loss {change:+z.4f}, KL {kl:.5f}, {size:.2f} MB"
                points[0].append((bits, Estimate(kl, kl, kl), said))
                points[1].append((size, Estimate(change, change, change), said))
                every.append(bits)
            for of_panel, its in zip(lines, points, strict=True):
                of_panel.append(Line(label, SHADES[place % len(SHADES)], its))
        placed = whole_bits(panels[0], lines[0], every)
        panel(panels[0], placed, bits_of(target), "KL divergence, nats")
        panels[1].xaxis.set_major_locator(ticker.MaxNLocator(5))
        panel(panels[1], lines[1], "MB of the checkpoint", "change of loss, nats")

    return View(what(target), 2, draw)


def compared(target: str, measure: str, answers: Answers) -> View:
    """Return how much more few bits cost each checkpoint than the baseline: a panel for each
    number of bits, a row a checkpoint."""
    baseline = answers.baseline.checkpoint
    variants = {result.checkpoint: result.variant for result in answers.results}
    wanted = (target, measure, baseline)
    own = [e for e in answers.differences if (e.target, e.measure, e.second) == wanted]
    names, widths = (
        list(dict.fromkeys(found)) for found in zip(*((e.first, e.bits) for e in own), strict=True)
    )

    def draw(panels: Sequence[Axes]) -> None:
        for axes, bits in zip(panels, widths, strict=True):
            axes.axvline(0, color=RULE, linewidth=1)
            for each in (e for e in own if e.bits == bits):
                row, shade = names.index(each.first), shade_of(variants[each.first])
                axes.hlines(row, each.rise.low, each.rise.high, color=shade)
                said = "significant" if each.significant else "not significant"
                tip = f"tip:{each.first}: {bits} bits, {signed(each.rise)} nats, {said}"
                face = shade if each.significant else "none"
                axes.plot([each.rise.value], [row], "o", color=shade, mfc=face, gid=tip)
            axes.set_title(f"{bits} bits", fontsize="medium")
            axes.set_ylim(len(names) - 0.5, -0.5)
            axes.set_yticks(range(len(names)), names if axes is panels[0] else [""] * len(names))
            axes.xaxis.set_major_locator(ticker.MaxNLocator(2))
            axes.xaxis.set_major_formatter(DECIMALS)

    return View(f"{what(target)}, {measure}", len(widths), draw)


def outliers(target: str, ranks: Sequence[float], own: Sequence[SweepResult], kind: str) -> View:
    """Return the checkpoints' mean rank of divergence against a kind of outliers."""

    def draw(panels: Sequence[Axes]) -> None:
        for axes, figure in zip(panels, FIGURES, strict=True):
            points = []
            for result, x, rank in zip(
                own, explain.statistics(own)[f"{kind}s: {figure}"], ranks, strict=True
            ):
                shade, name = shade_of(result.variant), result.checkpoint
                tip = f"tip:{name}: {figure} {x:.2f}, mean rank {rank:.2f}"
                axes.plot([x], [rank], "o", color=shade, gid=tip)
                points.append(Line(name, shade, [(x, Estimate(rank, rank, rank), "")]))
            places = [x for line in points for x, *_ in line.points]
            if max(places) > 10 * min(places):
                axes.set_xscale("log")
                axes.xaxis.set_major_locator(ticker.LogLocator(numticks=5))
                axes.xaxis.set_minor_formatter(ticker.NullFormatter())
                axes.xaxis.set_major_formatter("{x:g}")
            axes.set(xlabel=f"{figure} of {kind}s", ylabel="mean rank (1: loses least)")
            axes.margins(0.1)
            label_lines(axes, points, beside=True)

    return View(f"few bits of {what(target)}, outliers of {kind}s", 2, draw)


def questions(answers: Answers) -> list[Question]:
    """Return the questions that results can answer, with their figures."""
    asked, of_schemes = [], []
    for target in answers.targets:
        settings = by_setting(r for r in answers.results if r.config.target == target)
        # Settings of few widths or checkpoints would be panels with little in them.
        most = max(map(len, settings.values()))
        taken = [choice.setting for choice in answers.choices if choice.target == target]
        full = {name: own for name, own in settings.items() if len(own) == most}
        first, *rest = target.split("+")
        beside = f" when {what('+'.join(rest))} are quantized too" if rest else ""
        title = f"What do fewer bits of {what(first)} cost each variant{beside}?"
        views = [variants(full[name]) for name in sorted(full, key=lambda n: n not in taken)]
        asked.append(Question(target, title, "Lower is better. " + BARS, views))
        if len(full) > 1:
            of_schemes.append(schemes(target, full))
    if of_schemes:
        title = "Which scheme loses least at each width, and for each megabyte?"
        reading = "Lower is better. Each point is a mean of the checkpoints."
        asked.append(Question("schemes", title, reading, of_schemes))
    name = answers.baseline.checkpoint
    answered = dict.fromkeys((e.target, e.measure) for e in answers.differences if e.second == name)
    if answered:
        title = f"Which variants lose more or less than {name}?"
        reading = (
            f"Nats a token by which a variant's loss rises more, or it diverges further, than "
            f"{name} at the same bits: to the left it loses less. Filled points are significant on "
            "each held-out book. " + BARS
        )
        views = [compared(*each, answers) for each in answered]
        asked.append(Question("differences", title, reading, views))
    own = [result for result in answers.results if result.config == UNQUANTIZED]
    ranks = explain.mean_ranks(answers.results)
    if len(own) > 1 and ranks:
        title = "Do outliers explain which variant loses most?"
        reading = "If they did, points would rise to the right. Ranks are means of all configs."
        pairs = itertools.product(("input", "weight"), answers.targets)
        views = [outliers(t, ranks[t].tolist(), own, kind) for kind, t in pairs if t in ranks]
        asked.append(Question("outliers", title, reading, views))
    return asked


def figure_of(views: Sequence[View], titled: bool = False) -> Figure:
    """Return views below each other, each with its name if asked for."""
    figure = Figure(figsize=(WIDTH, HEIGHT * len(views)), layout="constrained")
    rows = figure.subfigures(len(views), 1, squeeze=False)[:, 0]
    for row, view in zip(rows, views, strict=True):
        view.draw(row.subplots(1, view.panels, squeeze=False)[0])
        if titled:
            row.suptitle(view.name, fontsize="medium")
    return figure


def svg(view: View, salt: str) -> str:
    """Return a view for the page: text and rules in its colors, and points that tell values."""
    buffer, without = io.StringIO(), dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with matplotlib.rc_context(STYLE | {"svg.hashsalt": salt}):
        figure_of([view]).savefig(buffer, format="svg", transparent=True, metadata=without)
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    for pattern, replacement in (
        (r'^<svg .*?viewBox="(.*?)".*?>', r'<svg viewBox="\1">'),  # as wide as the page lets it
        (r"xlink:href", "href"),
        (r'id="tip:', 'class="point" tabindex="0" data-tip="'),
        (r'id="of:', 'data-of="'),
        (r' id="[^"]*_\d+"', ""),  # the same in every figure
        (TEXT, "currentColor"),
        (RULE, "var(--rule)"),
    ):
        text = re.sub(pattern, replacement, text, flags=re.DOTALL)
    return text


def draw(asked: Sequence[Question], folder: Path, prefix: str = "") -> dict[str, Path]:
    """Draw the first views of each question; return the PNG files by its name."""
    drawn = {}
    with matplotlib.rc_context(STYLE):
        for question in asked:
            path = folder / f"{prefix}{question.name}.png"
            save_figure(figure_of(question.views[:FEW], titled=True), path)
            drawn[question.name] = path
    return drawn
