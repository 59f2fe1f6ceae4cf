"""What `quant.sensitivity` found: mixed widths beside uniform ones."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from matplotlib.figure import Figure

from attnserve.evaluation.intervals import Estimate
from attnserve.reports import color, table
from quant.report.frame import shown


@dataclass(frozen=True)
class Choice:
    """A choice of widths.

    Args:
        kind: `uniform`, `mixed` or `budget`.
        size: bytes of the quantized layers.
        bits: mean stored bits of a weight.
        divergence: nats per token.
    """

    kind: str
    size: int
    bits: float
    divergence: Estimate


@dataclass(frozen=True)
class Frontier:
    """A checkpoint's choices, by size.

    Args:
        checkpoint: its name.
        scheme: of all layers.
        choices: uniform and mixed.
        chosen, measured: titles of the texts that widths were chosen and measured on.
    """

    checkpoint: str
    scheme: str
    choices: list[Choice]
    chosen: str
    measured: str

    def beside(self) -> list[tuple[Choice, Choice]]:
        """Each uniform width between the ends, and the largest mixture that is not larger."""
        uniform = [choice for choice in self.choices if choice.kind == "uniform"]
        mixed = [choice for choice in self.choices if choice.kind == "mixed"]
        found = []
        for one in uniform[1:-1]:
            fitting = [choice for choice in mixed if choice.size <= one.size]
            if fitting:
                found.append((one, fitting[-1]))
        return found


def read_all(folder: Path) -> list[Frontier]:
    """What lies in `sensitivity/` of a results' folder, softmax first.

    Raises:
        ValueError: a file is no result of quant.sensitivity.
    """
    found = []
    for path in sorted(folder.glob("sensitivity/*.json")):
        try:
            fields = json.loads(path.read_text(encoding="utf-8"))
            choices = [
                Choice(p["kind"], p["size"], p["bits"], Estimate.from_json(p["divergence"]))
                for p in fields["points"]
            ]
            choices.sort(key=lambda choice: choice.size)
            titles = (fields["texts"][of] for of in ("chosen", "measured"))
            found.append(Frontier(fields["checkpoint"], fields["key"]["scheme"], choices, *titles))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is not a result of quant.sensitivity: {error!r}") from error
    return sorted(found, key=lambda one: (one.checkpoint != "softmax", one.checkpoint))


def text(frontiers: Sequence[Frontier]) -> str:
    """Markdown: what mixing saves at each uniform width."""
    rows = [
        [
            one.checkpoint,
            f"{uniform.bits:.2f}",
            f"{uniform.size}",
            shown(uniform.divergence),
            f"{mixed.size}",
            shown(mixed.divergence),
            f"{uniform.divergence.value / mixed.divergence.value:.2f}",
        ]
        for one in frontiers
        for uniform, mixed in one.beside()
    ]
    if not rows:
        return "Not measured: `python -m quant.sensitivity CHECKPOINT`."
    schemes, chosen, measured = (
        ", ".join(dict.fromkeys(getattr(one, of) for one in frontiers))
        for of in ("scheme", "chosen", "measured")
    )
    header = [
        "",
        "bits/weight",
        "bytes",
        "KL, uniform",
        "bytes, mixed",
        "KL, mixed",
        "uniform/mixed",
    ]
    return (
        f"Widths of 2, 3, 4 and 8 bits for single layers, chosen on: {chosen}; measured on: "
        f"{measured} ({schemes}, `python -m quant.sensitivity`). Beside each uniform width: the "
        "choice that is no larger.\n\n" + table(header, rows)
    )


def plot(frontiers: Sequence[Frontier]) -> Figure:
    """Divergence against bytes: a line a checkpoint for mixtures, squares for uniform widths."""
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    axes = figure.subplots()
    for one in frontiers:
        for kind, style in (("mixed", ".-"), ("uniform", "s")):
            own = [choice for choice in one.choices if choice.kind == kind]
            axes.plot(
                [choice.bits for choice in own],
                [choice.divergence.value for choice in own],
                style,
                color=color(one.checkpoint),
                label=f"{one.checkpoint}, {kind}",
                linewidth=1,
            )
    axes.set(yscale="log", xlabel="stored bits per weight", ylabel="KL, nats")
    axes.legend(fontsize="small")
    axes.set_title("; ".join(dict.fromkeys(f"measured on: {one.measured}" for one in frontiers)))
    return figure
