"""Bring a checkpoint that another program quantized into a format that is served, or into GGUF."""

import json
from pathlib import Path
from typing import Annotated

import typer

from attnserve.command import AsJson, expanded, main, needs


@needs("quant")
def convert(
    checkpoint: Annotated[
        Path,
        typer.Argument(
            help="A GGUF file of a Llama, or a folder in the format of GPTQ, AWQ, bitsandbytes or "
            "compressed-tensors."
        ),
    ],
    out: Annotated[Path, typer.Argument(help="The folder to write, or with gguf the file.")],
    format: Annotated[
        str,
        typer.Option(help="pack-quantized, which vLLM serves, or gguf, which llama.cpp loads."),
    ] = "pack-quantized",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace OUT if it is a quantized checkpoint.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Bring a quantized checkpoint into another format.

      python -m quant.convert model-Q4_0.gguf model-packed

    The values stay: nothing is quantized again. Layers whose values are no integers times a scale
    (NF4, and of GGUF the types with blocks of 16 columns) are written dequantized. docs/QUANT.md
    says what is read.
    """
    from quant.conversion import convert_checkpoint

    sizes = convert_checkpoint(expanded(checkpoint), out, format, overwrite)
    if as_json:
        print(json.dumps({"out": str(out), **sizes}))
        return
    print(f"{sizes['packed']} layers as they are, {sizes['dequantized']} dequantized")
    print(f"{sizes['bytes'] / 1e6:.2f} MB in {out}")


if __name__ == "__main__":
    main(convert, "python -m quant.convert")
