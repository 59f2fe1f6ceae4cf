"""Options that the commands of this package share."""

from pathlib import Path
from typing import Annotated

import typer

OUT = Path("runs") / "quant"
"""Where the commands write and read results if no folder is named, in the current folder."""
COLUMNS = (
    "Columns of the weights that share a scale, or channel for a whole row, or auto: 64, and of "
    "two-level scales 16 for 2 bits and 32 for more."
)


AUTO = 0
"""The columns of a group where each scheme is to have its own number."""


def columns(text: str | int) -> int | None:
    """Return the columns of a group, None for `channel`."""
    if text == "channel":
        return None
    if text in ("auto", AUTO):
        return AUTO
    if not str(text).isdecimal() or int(text) < 1:
        raise typer.BadParameter(f"{text} is neither a whole number above 0 nor channel nor auto")
    return int(text)


GroupSize = Annotated[
    int | None, typer.Option("--group-size", "--group", parser=columns, metavar="N", help=COLUMNS)
]
Symmetric = Annotated[bool, typer.Option("--symmetric", help="Use no zero points.")]
ActOrder = Annotated[
    bool,
    typer.Option("--act-order/--no-act-order", help="gptq takes the columns by their Hessian."),
]
Search = Annotated[
    bool,
    typer.Option(
        "--search/--no-search",
        help="gptq chooses scales and zero points by the error they leave, not by extremes. With "
        "neither this nor --act-order it is GPTQ as published.",
    ),
]
LmHead = Annotated[bool, typer.Option("--lm-head", help="Quantize the head's weights too.")]
Length = Annotated[
    int, typer.Option(min=2, help="Tokens of a sequence; the training length at most.")
]
Calibration = Annotated[int, typer.Option(min=1, help="Sequences of text to calibrate on.")]
Seed = Annotated[int, typer.Option(help="Seed of the calibration text.")]
CalibrationText = Annotated[
    list[Path] | None,
    typer.Option(
        metavar="FILE",
        help="UTF-8 text to calibrate on. Default: the unquantized checkpoint writes it.",
    ),
]
Books = Annotated[
    Path | None,
    typer.Option(
        metavar="DIR",
        help="The novels that the reference checkpoints were trained on, for both: two are held "
        "out and measured on.",
    ),
]
TextFrom = Annotated[
    Path | None,
    typer.Option(
        metavar="CHECKPOINT",
        help="The checkpoint that writes text, for all. Default: of those with one tokenizer the "
        "first with softmax attention, else the first.",
    ),
]
Force = Annotated[bool, typer.Option("--force", help="Measure again what is there.")]
