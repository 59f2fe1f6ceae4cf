"""The sweep's figures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
import numpy as np
from matplotlib.figure import Figure

from attnserve.reports import color
from quant.config import QuantConfig
from quant.outliers import FIGURES
from quant.report import frontier
from quant.report.frame import setting, text_of
from quant.store import Stored

METRICS = {"test KL": "KL to the unquantized model, nats", "test loss change": "loss change, nats"}


def degradation(results: Sequence[Stored], target: str) -> Figure:
    """Divergence and change of loss on the main text against bits: a column a setting, a line a
    checkpoint."""
    own = [stored for stored in results if stored.config.target == target]
    settings = list(dict.fromkeys(setting(stored.config) for stored in own))
    figure = Figure(figsize=(1 + 3.6 * len(settings), 6.5), layout="constrained")
    panels = figure.subplots(2, len(settings), squeeze=False, sharex=True, sharey="row")
    for column, name in enumerate(settings):
        chosen = [stored for stored in own if setting(stored.config) == name]
        for checkpoint in dict.fromkeys(stored.checkpoint for stored in chosen):
            line = [stored for stored in chosen if stored.checkpoint == checkpoint]
            line.sort(key=lambda stored: stored.config.bits or 0)
            bits = [stored.config.bits for stored in line]
            for axes, metric in zip(panels[:, column], METRICS, strict=True):
                ends = np.array([stored.summary[metric] for stored in line])
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


def outliers(results: Sequence[Stored]) -> Figure:
    """Kurtosis and largest over median of weights and of linear inputs: mean and largest layer."""
    own = [stored for stored in results if stored.config == QuantConfig()]
    figure = Figure(figsize=(9, 6.5), layout="constrained")
    panels = figure.subplots(2, 2)
    for row, kind in enumerate(("weight", "input")):
        for column, name in enumerate(FIGURES):
            axes = panels[row, column]
            for stored in own:
                layers = np.array(list(stored.details[f"{kind} outliers"].values()))[:, column]
                shade = color(stored.variant)
                axes.bar(stored.checkpoint, layers.mean(), color=shade)
                axes.plot([stored.checkpoint], [layers.max()], color=shade, marker="_", ls="")
            # Weights are close to a normal distribution, inputs far from it.
            scale = "log" if kind == "input" else "linear"
            axes.set(title=f"{kind}s: {name}", yscale=scale)
            axes.tick_params(axis="x", rotation=45)
    figure.suptitle("bar: mean of the linear layers; dash: the largest of them")
    return figure


def draw(
    results: Sequence[Stored],
    folder: Path,
    mixed: Sequence[frontier.Frontier] = (),
    prefix: str = "",
) -> dict[str, Path]:
    """Draw what there is; returns the PNG files by name, which is theirs without the prefix."""
    folder.mkdir(parents=True, exist_ok=True)
    drawn = {}
    with matplotlib.rc_context({"font.size": 9}):
        targets = dict.fromkeys(s.config.target for s in results if s.config != QuantConfig())
        figures = {f"degradation-{target}": degradation(results, target) for target in targets}
        if any(stored.config == QuantConfig() for stored in results):
            figures["outliers"] = outliers(results)
        if mixed:
            figures["mixed"] = frontier.plot(mixed)
        for name, figure in figures.items():
            drawn[name] = folder / f"{prefix}{name}.png"
            # Without the version of matplotlib, which would change the file.
            figure.savefig(drawn[name], dpi=110, metadata={"Software": None})
    return drawn
