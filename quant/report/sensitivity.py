"""What `quant.sensitivity` found: a plot, and tables."""

from pathlib import Path

import matplotlib
from matplotlib.figure import Figure

from attnserve.reports import save_figure, table
from quant.layerwise import Sensitivity


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
            own = [choice for choice in found.choices if choice.kind == kind]
            if own:
                own.sort(key=lambda choice: choice.size)
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
