"""Find how much each layer suffers from few bits, and bits for each layer within a budget."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import typer

from attnserve.command import AsJson, expanded, main, needs
from attnserve.evaluation.arguments import Texts
from quant import options
from quant.schemes.registry import SCHEMES


@needs("quant")
def sensitivity(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face folder.")],
    bits: Annotated[list[int], typer.Option(min=2, max=8, help="Bits of a layer.")] = options.BITS,
    scheme: Annotated[str, typer.Option(help=f"One of {', '.join(SCHEMES)}.")] = "gptq",
    group_size: options.GroupSize = 64,
    symmetric: options.Symmetric = False,
    lm_head: options.LmHead = False,
    budget: Annotated[
        int | None,
        typer.Option(min=1, metavar="BYTES", help="Bytes of the quantized layers to fit into."),
    ] = None,
    sequences: Annotated[int, typer.Option(min=1, help="Sequences of each text.")] = 8,
    length: options.Length = 512,
    calibration: options.Calibration = 16,
    seed: options.Seed = 0,
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
    from quant.layerwise import Settings, analyze
    from quant.report.sensitivity import plot_layers, tables
    from quant.texts import Sources, explained

    settings = Settings(
        bits=bits,
        scheme=scheme,
        group_size=group_size,
        symmetric=symmetric,
        lm_head=lm_head,
        sequences=sequences,
        length=length,
        calibration=calibration,
        seed=seed,
    )
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
