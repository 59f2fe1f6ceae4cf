"""Write the page of converted models beside their softmax original."""

from __future__ import annotations

import json
import shlex
import sys
from pathlib import Path
from typing import Annotated

from typer import Argument, Exit, Option

from attnserve.command import AsJson, expanded, main, needs
from attnserve.errors import UserError
from attnserve.evaluation.arguments import SETS
from attnserve.files import check_writable
from training.arguments import device_of


@needs("train")
@needs("quant")
def compare(
    original: Annotated[
        Path,
        Argument(metavar="ORIGINAL", help="Folder of the softmax Llama.", show_default=False),
    ],
    converted: Annotated[
        list[Path],
        Argument(metavar="CONVERTED", help="Folders of what was made of it.", show_default=False),
    ],
    text: Annotated[
        Path,
        Option(
            metavar="FILE",
            help="UTF-8 text to measure on, best one that no model has seen.",
            show_default=False,
        ),
    ],
    out: Annotated[Path, Option(metavar="DIR", help="Folder of the page and of all results.")],
    seen: Annotated[
        str, Option(metavar="WORDS", help="What is known of whether the models had seen the text.")
    ] = "not said (--seen).",
    sets: Annotated[
        Path | None, Option("--eval", metavar="DIR", help=f"Folder of the evaluation sets: {SETS}.")
    ] = None,
    calibration_text: Annotated[
        Path | None,
        Option(metavar="FILE", help="Another text, to calibrate on. Default: ORIGINAL writes it."),
    ] = None,
    context: Annotated[
        int | None,
        Option(min=8, help="ORIGINAL's training length in tokens. Default: what its folder says."),
    ] = None,
    quick: Annotated[
        bool, Option("--quick", help="Few texts: minutes for 135M parameters on two cores.")
    ] = False,
    sequence: Annotated[
        int | None,
        Option(
            min=8,
            help="Tokens of a sequence of perplexity and attention, the training length at most. "
            "Default: 2048, --quick 512.",
            show_default=False,
        ),
    ] = None,
    max_length: Annotated[
        int | None,
        Option(
            min=1,
            help="Tokens of the longest context, 8 training lengths at most. Default: 16384, "
            "--quick 2048.",
            show_default=False,
        ),
    ] = None,
    bits: Annotated[
        list[int] | None,
        Option(min=2, max=8, help="Default: 2 3 4 5 6 8, --quick 2 3 4 8.", show_default=False),
    ] = None,
    serves: Annotated[
        bool | None,
        Option(
            "--serve/--no-serve",
            help="Serve the models, on a CPU, for memory and throughput. Default: not with "
            "--quick.",
            show_default=False,
        ),
    ] = None,
    device: Annotated[
        str | None,
        Option(
            help="Where transformers runs the models: cpu, cuda. Default: cuda if there is one."
        ),
    ] = None,
    jobs: Annotated[
        int | None, Option(min=1, help="Processes of quantization. Default: one a core.")
    ] = None,
    force: Annotated[
        bool, Option("--force", help="Measure again what is there, but for losses of KV budgets.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write the page of converted models beside their softmax original.

      python -m training.compare original converted --text mine.txt --out page --quick

    It measures perplexity and, with --eval, zero-shot tasks; sinks, zeros, outliers; what few bits
    cost; long contexts; of selective attention how little KV cache it needs; and memory and
    throughput of the served models. Figures of a converted model stand beside its original's, with
    the change text by text, and beside what the variant's paper claims, with a verdict by a rule
    that the page states.

    Everything is kept in --out: the same command goes on where it was. A measurement that fails is
    named on the page, and the exit code is 1 then. Quantization and KV budgets are measured on the
    CPU, whatever --device is. Without --quick it takes hours on two cores for 135M parameters, most
    of them for budgets, if one is selective.
    """
    import transformers

    from attnserve import machine
    from attnserve.evaluation.checkpoint import Checkpoint
    from attnserve.evaluation.measures import Data
    from attnserve.sampled_text import alphabet
    from training.compare import page, stages
    from training.compare.effort import QUICK, Effort
    from training.conversion import trained_length

    transformers.utils.logging.disable_progress_bar()
    folders = [expanded(folder) for folder in (original, *converted)]
    checkpoints = [Checkpoint(folder) for folder in folders]
    names = [one.name for one in checkpoints]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two checkpoints are called {min(twice)}: rename one of the folders")
    first, *others = checkpoints
    if first.variant != "softmax":
        raise UserError(
            f"{original} has {first.variant} attention: name the softmax original first"
        )
    for one in others:
        if alphabet(one) != alphabet(first):
            raise UserError(f"{one.folder} and {original} differ in their tokenizers")
    check_writable(out / page.PAGE)
    device = device_of(device)
    effort = stages.shortened(
        QUICK if quick else Effort(), sequence=sequence, max_length=max_length, serves=serves,
        bits=tuple(bits) if bits else None,
    )  # fmt: skip
    length = context or trained_length(first.folder, first.config)
    checkpoints = [Checkpoint(folder, length) for folder in folders]
    comparison = stages.Comparison(
        checkpoints[0], checkpoints[1:], Data(evaluation=sets, text=text), calibration_text, length,
        effort, device, jobs or machine.cores(), force, out,
    )  # fmt: skip
    stages.check(comparison)
    for stage in stages.STAGES:
        stage(comparison)
    arguments = sys.argv[1:][sys.argv[1:2] == ["compare"] :]  # of `python -m training compare`
    command = shlex.join(["python", "-m", "training.compare", *arguments])
    file, changes = page.write(comparison, seen, quick, command)
    if as_json:
        print(json.dumps({"page": str(file), "failed": comparison.failures, "changes": changes}))
    else:
        for name, own in changes.items():
            print(f"{name}:")
            print("\n".join(f"  {what}: {verdict}" for what, verdict in own.items()))
        print(f"Page: {file}")
    if comparison.failures:
        raise Exit(1)


if __name__ == "__main__":
    main(compare, "python -m training.compare")
