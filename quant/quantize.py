"""Write a checkpoint with packed weights, so that `vllm serve` serves it."""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Annotated

import typer

from attnserve.command import AsJson, expanded, main, needs
from attnserve.errors import UserError
from quant import options
from quant.schemes.registry import SCHEMES, SERVED, get_scheme


@needs("quant")
def quantize(
    checkpoint: Annotated[Path, typer.Argument(help="A Hugging Face folder.")],
    out: Annotated[Path, typer.Argument(help="The folder to write.")],
    bits: Annotated[int | None, typer.Option(min=2, max=8, help="Bits of a weight.")] = None,
    bits_per_weight: Annotated[
        float | None,
        typer.Option(
            min=2,
            max=9,
            help="In place of --bits: bits of a weight on average, scales and zero points "
            "included. Each layer gets bits of its own, by what few bits of it cost.",
        ),
    ] = None,
    scheme: Annotated[
        str,
        typer.Option(
            metavar="SCHEME",
            help="; ".join(f"{name}: {SCHEMES[name].title}" for name in SERVED) + ".",
        ),
    ] = "two-level",
    group_size: options.GroupSize = options.AUTO,
    symmetric: options.Symmetric = False,
    act_order: options.ActOrder = True,
    search: options.Search = True,
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
    kv_cache_dtype: Annotated[
        str | None,
        typer.Option(
            metavar="DTYPE",
            help="Keys and values too, when they are served: int8_per_token_head or "
            "int4_per_token_head, which config.json then names. Without --bits, weights stay as "
            "they are.",
        ),
    ] = None,
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

      python -m quant.quantize checkpoints/softpick softpick-4bit --bits 4
      python -m quant.quantize checkpoints/softpick softpick-small --bits-per-weight 2.5
      python -m quant.quantize checkpoints/softpick softpick-kv --kv-cache-dtype int8_per_token_head

    Linear layers are quantized as `python -m quant.sweep` does it, with the same settings. What is
    calibrated is calibrated on text that the checkpoint writes itself, if no --calibration-text is
    given. gptq, hqq and rtn are written in compressed-tensors' format; docs/QUANT.md says who can
    read it. Two-level scales are served by vLLM with this project's plugin.
    """
    from attnserve.evaluation.checkpoint import Checkpoint
    from quant import budget
    from quant import checkpoint as checkpoints
    from quant.model import empty_model
    from quant.texts import Sources, text_for
    from quant.texts import calibration_text as read_calibration_text

    folder = expanded(checkpoint)
    chosen = [bits is not None, bits_per_weight is not None]
    if all(chosen) or not (any(chosen) or kv_cache_dtype):
        raise UserError("give either --bits or --bits-per-weight")
    recipe = checkpoints.Recipe(
        bits if bits_per_weight is None else min(8, int(bits_per_weight)),
        scheme,
        group_size,
        symmetric,
        act_order,
        search,
        embeddings,
        activations,
        format,
        bits_per_weight,
        kv_cache_dtype,
    )
    checkpoints.check_folders(folder, out, overwrite)
    checkpoints.check_layers(folder, recipe)
    said, text, specs, named = str(recipe), None, {}, get_scheme(scheme)
    if recipe.calibrated:
        given = Sources((), calibration_text or (), books, writer=text_from)
        sources = given.for_checkpoints([folder])[folder]
        reader = Checkpoint(folder, longest=length)
        if bits_per_weight is not None:
            widths = budget.candidates(named, bits_per_weight, group_size)
            budget.check_reach(named, widths, bits_per_weight, empty_model(folder))
        text = read_calibration_text(sources, reader, calibration, seed)
        if bits_per_weight is not None:
            measured = text_for("validation", sources, reader, budget.MEASURED, reader.context - 1)
            specs = budget.spend(
                folder, named, recipe.options, widths, bits_per_weight, text, measured
            )
        said += f" --calibration {calibration} --length {length} --seed {seed}"
    card = f"`python -m quant.quantize {said}`" + (f", calibrated on: {text.title}" if text else "")
    try:
        _, sizes = checkpoints.quantize_checkpoint(folder, out, recipe, text, card, specs)
    except KeyboardInterrupt:
        print(
            "stopped; the layers that are quantized are kept, and the same command goes on there",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    widths_of = Counter(f"{s.bits} bits in groups of {s.group_size}" for s in specs.values())
    if as_json:
        line = {
            "out": str(out),
            "settings": said,
            "calibrated_on": text.title if text else None,
            "layers": widths_of,
            "parts": sizes.to_dict("index"),
        }
        print(json.dumps(line))
        return
    print(f"{'':12}{'numbers':>14}{'MB before':>12}{'MB after':>12}{'bits a number':>16}")
    for name, numbers, before, after in sizes.itertuples():
        megabytes = f"{before / 1e6:12.2f}{after / 1e6:12.2f}"
        print(f"{name:12}{numbers:14,}{megabytes}{8 * after / numbers:16.3f}")
    for width, count in sorted(widths_of.items()):
        print(f"{count} linear layers: {width}")
    if text:
        print(f"Calibrated on: {text.title}")


if __name__ == "__main__":
    main(quantize, "python -m quant.quantize")
