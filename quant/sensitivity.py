"""Find how much each layer suffers from few bits, and bits for each layer within a budget."""

import json
from pathlib import Path
from typing import Annotated

import typer

from attnserve.command import AsJson, expanded, main, needs, options_of
from attnserve.evaluation.arguments import Texts
from quant import options
from quant.config import LayerSettings


@options_of(LayerSettings)
@needs("quant")
def sensitivity(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face folder.")],
    *,
    settings: LayerSettings,
    budget: Annotated[
        int | None,
        typer.Option(min=1, metavar="BYTES", help="Bytes of the quantized layers to fit into."),
    ] = None,
    text: Texts = None,
    calibration_text: options.CalibrationText = None,
    books: options.Books = None,
    text_from: options.TextFrom = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of results.")] = (
        options.OUT / "sensitivity"
    ),
    force: options.Force = False,
    as_json: AsJson = False,
) -> None:
    """Find how much each layer suffers from few bits, and bits for each layer within a budget.

      python -m quant.sensitivity checkpoints/softpick --budget 1200000

    One layer at a time is quantized, and its KL divergence measured on one text; choices of bits
    for all layers, mixed and uniform ones, are measured on another. Where no text is named, the
    unquantized checkpoint writes both. What has been measured is in a journal under --out, and is
    not measured again.
    """
    from quant.layerwise import analyze
    from quant.report.sensitivity import plot_layers, tables
    from quant.texts import Sources, explained

    sources = Sources(text or (), calibration_text or (), books, writer=text_from)
    found = analyze(expanded(checkpoint), settings, sources, budget, out, force)
    written, plot = found.write(out), out / f"{found.name}.png"
    plot_layers(found, plot)
    if as_json:
        points = [
            [choice.kind, choice.size, round(choice.bits, 3), *choice.divergence.json()]
            for choice in found.choices
        ]
        print(json.dumps({"out": str(written), "plot": str(plot), "points": points}))
        return
    print(f"Chosen on: {found.chosen}. {explained(found.measured, found.calibration)}")
    print(tables(found))
    print(f"Written: {written}, {plot}")


if __name__ == "__main__":
    main(sensitivity, "python -m quant.sensitivity")
