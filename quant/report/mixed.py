"""What `quant.sensitivity` found: mixed bits beside uniform ones."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from attnserve.reports import color, save_figure, table
from quant.layerwise import Choice, Sensitivity
from quant.report.frame import shown

HEADER = (
    "", "bits/weight", "bytes", "KL, uniform", "bytes, mixed", "KL, mixed", "uniform/mixed"
)  # fmt: skip


def read_all(folder: Path) -> list[Sensitivity]:
    """Return what lies in `sensitivity/` of a results' folder, softmax first.

    Raises:
        UserError: a file is no result of quant.sensitivity.
    """
    found = [Sensitivity.read(path) for path in folder.glob("sensitivity/*.json")]
    return sorted(found, key=lambda one: (one.checkpoint != "softmax", one.checkpoint))


def by_size(found: Sensitivity, kind: str) -> list[Choice]:
    """Return the choices of a kind, the smallest first."""
    own = [choice for choice in found.choices if choice.kind == kind]
    return sorted(own, key=lambda choice: choice.size)


def beside(found: Sensitivity) -> list[tuple[Choice, Choice]]:
    """Return each uniform choice between the ends, and the largest mixed one that is not larger."""
    pairs = []
    for uniform in by_size(found, "uniform")[1:-1]:
        if fitting := [one for one in by_size(found, "mixed") if one.size <= uniform.size]:
            pairs.append((uniform, fitting[-1]))
    return pairs


def rows(results: Sequence[Sensitivity]) -> list[list[str]]:
    """Return what mixing saves at each uniform choice, under `HEADER`."""
    return [
        [
            found.checkpoint,
            f"{uniform.bits:.2f}",
            f"{uniform.size}",
            shown(uniform.divergence),
            f"{mixed.size}",
            shown(mixed.divergence),
            f"{uniform.divergence.value / mixed.divergence.value:.2f}",
        ]
        for found in results
        for uniform, mixed in beside(found)
    ]


def plot(results: Sequence[Sensitivity]) -> Figure:
    """Return divergence against bits: a line a checkpoint for mixed choices, squares for uniform
    ones."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for found in results:
        for kind, style in (("mixed", ".-"), ("uniform", "s")):
            own = by_size(found, kind)
            axes.plot(
                [choice.bits for choice in own],
                [choice.divergence.value for choice in own],
                style,
                color=color(found.checkpoint),
                label=f"{found.checkpoint}, {kind}",
                linewidth=1,
            )
    axes.set(yscale="log", xlabel="stored bits per weight", ylabel="KL, nats")
    axes.legend(fontsize="small")
    axes.set_title("; ".join(dict.fromkeys(f"measured on: {one.measured}" for one in results)))
    return figure


def plot_layers(found: Sensitivity, file: Path) -> None:
    """Draw the layers' divergences, and mixed choices beside uniform ones."""
    with matplotlib.rc_context({"font.size": 9}):
        figure = Figure(figsize=(11, 4.5), layout="constrained")
        left, right = figure.subplots(1, 2)
        for bits in next(iter(found.prices.values())):
            values = [own[bits].divergence for own in found.prices.values()]
            left.plot(values, label=f"{bits} bits")
        left.set(yscale="log", xlabel="linear layer", ylabel="KL with only this one, nats")
        for kind, style in (("uniform", "s"), ("mixed", ".-"), ("budget", "*")):
            if own := by_size(found, kind):
                values = [choice.divergence.value for choice in own]
                right.plot([choice.size / 1e6 for choice in own], values, style, label=kind)
        right.set(yscale="log", xlabel="MB of the quantized layers", ylabel="KL, nats")
        left.legend()
        right.legend()
        figure.suptitle(f"{found.checkpoint}, measured on: {found.measured}")
        save_figure(figure, file)


def tables(found: Sensitivity) -> str:
    """Return the layers' divergences, and the choices of bits, with 95 % intervals."""
    single = [
        [layer, *(f"{price.divergence:.6f}" for price in own.values())]
        for layer, own in found.prices.items()
    ]
    header = [f"{bits} bits" for bits in next(iter(found.prices.values()))]
    choices = [
        [choice.kind, f"{choice.bits:.3f}", f"{choice.size}", choice.divergence.shown(5)]
        for choice in sorted(found.choices, key=lambda choice: choice.size)
    ]
    return "\n\n".join(
        (
            table(["KL of one layer, nats", *header], single),
            table(["", "bits/weight", "bytes", "KL, nats"], choices),
        )
    )
