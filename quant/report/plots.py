"""The sweep's figures."""

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from attnserve.reports import color, save_figure
from quant.config import UNQUANTIZED
from quant.outliers import FIGURES
from quant.report.frame import setting, text_of
from quant.store import SweepResult

METRICS = {"test KL": "KL to the unquantized model, nats", "test loss change": "loss change, nats"}


def degradation(results: Sequence[SweepResult], target: str) -> Figure:
    """Return divergence and change of loss on the main text against bits: a column a setting, a
    line a checkpoint."""
    own = [result for result in results if result.config.target == target]
    settings = list(dict.fromkeys(setting(result.config) for result in own))
    figure = Figure(figsize=(1 + 3.6 * len(settings), 6.5), layout="constrained")
    panels = figure.subplots(2, len(settings), squeeze=False, sharex=True, sharey="row")
    for column, name in enumerate(settings):
        chosen = [result for result in own if setting(result.config) == name]
        for checkpoint in dict.fromkeys(result.checkpoint for result in chosen):
            line = [result for result in chosen if result.checkpoint == checkpoint]
            line.sort(key=lambda result: result.config.bits or 0)
            bits = [result.config.bits for result in line]
            for axes, metric in zip(panels[:, column], METRICS, strict=True):
                ends = np.array([result.summary[metric] for result in line])
                error = np.abs(ends[:, 1:] - ends[:, :1]).T
                shade = color(line[0].variant)
                axes.errorbar(
                    bits, ends[:, 0], error, label=checkpoint, color=shade, marker=".", capsize=2
                )
        panels[0, column].set(title=name, yscale="log")
        panels[1, column].set(xlabel=f"bits of {target.partition('+')[0]}")
        panels[1, column].set_yscale("symlog", linthresh=1e-3)
        panels[1, column].axhline(0, color="gray", linewidth=0.5)
    for axes, label in zip(panels[:, 0], METRICS.values(), strict=True):
        axes.set_ylabel(label)
    panels[0, 0].legend(fontsize="small")
    figure.suptitle(f"{target}, {text_of(results)}, 95 % intervals")
    return figure


def outliers(results: Sequence[SweepResult]) -> Figure:
    """Return kurtosis and largest over median of weights and of linear inputs: mean and largest
    layer."""
    own = [result for result in results if result.config == UNQUANTIZED]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    panels = figure.subplots(2, 2)
    for row, kind in enumerate(("weight", "input")):
        for column, name in enumerate(FIGURES):
            axes = panels[row, column]
            for result in own:
                layers = np.array(list(result.details[f"{kind} outliers"].values()))[:, column]
                shade = color(result.variant)
                axes.bar(result.checkpoint, layers.mean(), color=shade)
                axes.plot([result.checkpoint], [layers.max()], color=shade, marker="_", ls="")
            # Weights are close to a normal distribution, inputs far from it.
            scale = "log" if kind == "input" else "linear"
            axes.set(title=f"{kind}s: {name}", yscale=scale)
            axes.tick_params(axis="x", rotation=45)
    figure.suptitle("bar: mean of the linear layers; dash: the largest of them")
    return figure


def draw(results: Sequence[SweepResult], folder: Path, prefix: str = "") -> dict[str, Path]:
    """Draw what there is; return the PNG files by name, which is theirs without the prefix."""
    targets = dict.fromkeys(r.config.target for r in results if r.config != UNQUANTIZED)
    with matplotlib.rc_context({"font.size": 9}):
        figures = {f"degradation-{target}": degradation(results, target) for target in targets}
        if any(result.config == UNQUANTIZED for result in results):
            figures["outliers"] = outliers(results)
        drawn = {name: folder / f"{prefix}{name}.png" for name in figures}
        for name, figure in figures.items():
            save_figure(figure, drawn[name])
    return drawn
