"""Write a checkpoint with packed weights, so that `vllm serve` serves it."""

import json
from pathlib import Path
from typing import Annotated

import typer

from attnserve.command import AsJson, expanded, main, needs
from quant import options
from quant.schemes.registry import SCHEMES, SERVED


@needs("quant")
def quantize(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    bits: Annotated[int, typer.Option(min=2, max=8, help="Bits of a weight.")],
    scheme: Annotated[
        str,
        typer.Option(
            metavar="SCHEME",
            help="; ".join(f"{name}: {SCHEMES[name].title}" for name in SERVED) + ".",
        ),
    ],
    group_size: options.GroupSize = 64,
    symmetric: options.Symmetric = False,
    act_order: options.ActOrder = False,
    embeddings: Annotated[
        int | None,
        typer.Option(
            min=2,
            max=8,
            metavar="BITS",
            help="Quantize the token embeddings and the head too, to so many bits, by round to "
            "nearest. Default: they stay as they are.",
        ),
    ] = None,
    activations: Annotated[
        bool,
        typer.Option(
            "--activations",
            help="Inputs of linear layers in 8 bits too, one scale a token, through vLLM's own "
            "int8 kernel; with --bits 8 --symmetric --group-size channel.",
        ),
    ] = False,
    calibration: options.Calibration = 16,
    length: options.Length = 512,
    seed: options.Seed = 0,
    calibration_text: options.CalibrationText = None,
    books: options.Books = None,
    text_from: options.TextFrom = None,
    format: Annotated[
        str,
        typer.Option(
            help="pack-quantized, which vLLM serves, or gguf, which llama.cpp loads: then OUT is a "
            "file, for Llamas with softmax attention.",
        ),
    ] = "pack-quantized",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a quantized checkpoint.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write a checkpoint with packed weights, to be served.

      python -m quant.quantize checkpoints/softpick softpick-4bit --bits 4 --scheme gptq

    Linear layers are quantized as `python -m quant.sweep` does it, with the same settings. gptq is
    calibrated on text that the checkpoint writes itself, if no --calibration-text is given. What is
    written is compressed-tensors' format; docs/QUANT.md says who can read it.
    """
    from attnserve.evaluation.checkpoint import Checkpoint
    from quant import checkpoint as checkpoints
    from quant.texts import Sources
    from quant.texts import calibration_text as read_calibration_text

    folder = expanded(checkpoint)
    recipe = checkpoints.Recipe(
        bits, scheme, group_size, symmetric, act_order, embeddings, activations, format
    )
    checkpoints.check_folders(folder, out, overwrite)
    checkpoints.check_layers(folder, recipe)
    said, text = str(recipe), None
    if recipe.calibrated:
        given = Sources((), calibration_text or (), books, writer=text_from)
        sources = given.for_checkpoints([folder])[folder]
        text = read_calibration_text(sources, Checkpoint(folder, longest=length), calibration, seed)
        said += f" --calibration {calibration} --length {length} --seed {seed}"
    card = f"`python -m quant.quantize {said}`" + (f", calibrated on: {text.title}" if text else "")
    _, sizes = checkpoints.quantize_checkpoint(folder, out, recipe, text, card)
    if as_json:
        line = {
            "out": str(out),
            "settings": said,
            "calibrated_on": text.title if text else None,
            "parts": sizes.to_dict("index"),
        }
        print(json.dumps(line))
        return
    print(f"{'':12}{'numbers':>14}{'MB before':>12}{'MB after':>12}{'bits a number':>16}")
    for name, numbers, before, after in sizes.itertuples():
        megabytes = f"{before / 1e6:12.2f}{after / 1e6:12.2f}"
        print(f"{name:12}{numbers:14,}{megabytes}{8 * after / numbers:16.3f}")
    if text:
        print(f"Calibrated on: {text.title}")


if __name__ == "__main__":
    main(quantize, "python -m quant.quantize")
