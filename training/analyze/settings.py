"""What `python -m training.analyze` measures, and how."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

from typer import Option

from attnserve.evaluation.arguments import positive
from attnserve.files import CHECKOUT

FOLDER = CHECKOUT / "training" / "results" / "analysis"
QUICK_LIMIT, QUICK_MULTIPLE, MULTIPLE = 4, 2, 16


Name = StrEnum("Name", ["ATTENTION", "LENGTH", "PASSKEY", "LAMBADA", "BLIMP", "PERPLEXITY"])
TITLES = {
    Name.ATTENTION: "attention sinks, outliers, zeros, dead heads",
    Name.LENGTH: "loss by position up to many training lengths",
    Name.PASSKEY: "retrieval of a planted key",
    Name.LAMBADA: "last word of a passage",
    Name.BLIMP: "grammatical against ungrammatical sentences",
    Name.PERPLEXITY: "perplexity of held-out books and of WikiText-2",
}


@dataclass(frozen=True)
class AnalysisSettings:
    """Settings of all measures; the fields are options of the command."""

    engine: Annotated[
        Literal["transformers", "vllm"],
        Option(help="What runs the model, in float32; vllm leaves out `attention`."),
    ] = "transformers"
    limit: Annotated[
        int | None, Option(min=1, help="Cap on windows, sequences, passages, pairs. Default: none.")
    ] = None
    max_length: Annotated[
        int, Option(min=1, help=f"Longest context in tokens; {MULTIPLE} training lengths at most.")
    ] = 16384
    context: Annotated[
        int | None,
        Option(min=1, help="Training length in tokens. Default: max_position_embeddings."),
    ] = None
    quick: Annotated[
        bool,
        Option("--quick", help=f"--limit {QUICK_LIMIT} and {QUICK_MULTIPLE} training lengths."),
    ] = False
    rope_theta_factor: Annotated[
        float,
        Option(parser=positive, help="Multiplies RoPE's theta; length and passkey only."),
    ] = 1.0
    out: Annotated[Path, Option(help="Folder of the results.")] = FOLDER
    device: Annotated[
        str, Option(help="Where transformers runs the model: cpu, cuda. vllm chooses itself.")
    ] = "cpu"
    force: Annotated[bool, Option("--force", help="Measure again what is there.")] = False
