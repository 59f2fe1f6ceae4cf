"""Measure what 2 to 8 bits cost, for checkpoints, schemes and targets."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from attnserve.command import AsJson, expanded, main, needs
from attnserve.errors import UserError
from attnserve.evaluation.arguments import Texts
from quant import options
from quant.schemes.registry import SCHEMES, installed

SCHEME_TITLES = "; ".join(f"{name}: {scheme.title}" for name, scheme in SCHEMES.items())


@needs("quant")
def sweep(
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Hugging Face folders. Default: every checkpoint that comes with the project."
        ),
    ] = None,
    bits: Annotated[
        list[int], typer.Option(min=2, max=8, help="Bits of the first tensor of each target.")
    ] = options.BITS,
    schemes: Annotated[
        list[str],
        typer.Option(metavar="SCHEME", help=f"How weights are quantized. {SCHEME_TITLES}."),
    ] = options.SCHEMES,
    targets: Annotated[
        list[str],
        typer.Option(
            "--targets",
            "--what",
            metavar="TARGET",
            help="What is quantized: weights, activations (the inputs of linear layers), kv (the "
            "cache), or several joined by +.",
        ),
    ] = options.TARGETS,
    group_sizes: Annotated[
        list[int],
        typer.Option(
            "--group-sizes",
            "--groups",
            parser=options.columns,
            metavar="N",
            help="Columns of the weights that share a scale, or channel for a whole row.",
        ),
    ] = options.GROUP_SIZES,
    symmetric: options.Symmetric = False,
    act_order: options.ActOrder = False,
    lm_head: options.LmHead = False,
    static: Annotated[
        bool,
        typer.Option("--static", help="Calibrate scales of activations; else one for each token."),
    ] = False,
    activation_bits: Annotated[
        int, typer.Option(min=2, max=8, help="Bits of activations beside weights.")
    ] = 8,
    kv_bits: Annotated[
        int, typer.Option(min=2, max=8, help="Bits of the cache beside other tensors.")
    ] = 8,
    sequences: Annotated[
        int,
        typer.Option(min=1, help="Sequences of each text, for perplexity and KL divergence."),
    ] = 16,
    length: options.Length = 512,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of each BLiMP set, with --eval.")] = 50,
    passages: Annotated[int, typer.Option(min=1, help="Passages of LAMBADA, with --eval.")] = 100,
    calibration: options.Calibration = 16,
    seed: options.Seed = 0,
    text: Texts = None,
    calibration_text: options.CalibrationText = None,
    books: options.Books = None,
    text_from: options.TextFrom = None,
    evaluation: Annotated[
        Path | None,
        typer.Option(
            "--eval",
            metavar="DIR",
            help="A folder with wikitext2_test_raw.txt, lambada_test.jsonl and blimp/*.jsonl, "
            "which are measured too.",
        ),
    ] = None,
    lm_eval: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TASK",
            help="Tasks of lm-eval too, where their data is local: pip install -e '.[lm-eval]', "
            "HF_HUB_OFFLINE=1.",
        ),
    ] = None,
    lm_eval_include: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder with tasks of your own (YAML).")
    ] = None,
    lm_eval_limit: Annotated[
        int | None,
        typer.Option(min=1, metavar="N", help="Documents of a task. Default: all."),
    ] = None,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="Processes; fewer if memory is short. Default: one a core."),
    ] = None,
    ray: Annotated[
        bool,
        typer.Option(
            "--ray",
            help="Use the Ray cluster that RAY_ADDRESS names instead of --jobs; it must see the "
            "same folders.",
        ),
    ] = False,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of results.")] = options.OUT,
    force: options.Force = False,
    as_json: AsJson = False,
) -> None:
    """Measure what few bits cost, for checkpoints.

      python -m quant.sweep --bits 2 3 4 8
      python -m quant.sweep my-checkpoint --bits 3 4 --text mine.txt --calibration-text other.txt

    Where no text is named, the unquantized checkpoint writes it, the same for all checkpoints of
    one tokenizer. Every config is compared with the unquantized model, text by text. A row is
    printed when a config is done, and the report comes at the end.

    Each config is a file, configs/CHECKPOINT/CONFIG.json under --out, which is written when the
    config is done: a sweep that was killed goes on where it was when the command is given again.
    """
    if ray and not installed("ray"):
        raise UserError("--ray needs the library ray, which is not installed: leave it out")
    from quant import runner, store
    from quant.config import UNQUANTIZED, SearchSpace
    from quant.lm_eval_tasks import Harness
    from quant.report.frame import table
    from quant.report.write import write
    from quant.store import SweepResult
    from quant.texts import Samples, Sources, bundled_checkpoints, explained

    folders = [expanded(folder) for folder in checkpoints or bundled_checkpoints()]
    if not folders:
        raise UserError(
            "name a checkpoint's folder: only a checkout of the project has checkpoints of its own"
        )
    space = SearchSpace(
        targets=targets,
        bits=bits,
        schemes=schemes,
        group_sizes=group_sizes,
        activation_bits=activation_bits,
        kv_bits=kv_bits,
        symmetric=symmetric,
        act_order=act_order,
        lm_head=lm_head,
        static=static,
    )
    tasks = runner.plan(
        folders,
        space.configs(),
        Samples(sequences, length, pairs, passages, calibration, seed),
        Sources(text or (), calibration_text or (), books, evaluation, text_from),
        out,
        Harness.asked(lm_eval or (), lm_eval_include, lm_eval_limit),
    )
    there = [] if force else [task.path for task in tasks if runner.is_there(task)]
    missing = [task for task in tasks if task.path not in there]

    stream, sets = sys.stderr if as_json else sys.stdout, evaluation is not None
    wanted = jobs or len(os.sched_getaffinity(0))
    jobs = runner.affordable(wanted, folders)
    if jobs < wanted:
        print(f"memory is free for {jobs} of {wanted} jobs", file=stream)
    for said in dict.fromkeys(explained(**task.texts.titles) for task in tasks):
        print(said, file=stream)
    print(f"{len(missing)} configs to measure, {len(there)} there already", file=stream)
    known = sorted(map(store.read, there), key=lambda result: result.order)
    print(table(known, sets), file=stream, flush=True)

    def show(result: SweepResult) -> None:
        print(table([result], sets).splitlines()[1], file=stream, flush=True)

    try:
        failures = runner.run(missing, jobs, ray, show)
    except KeyboardInterrupt:
        print(
            f"stopped; what is done is in {out}, and the same command goes on from there",
            file=sys.stderr,
        )
        raise typer.Exit(130) from None
    for name, reason in failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)

    results = [store.read(task.path) for task in tasks if task.path.exists()]
    written = write(out) if results else {}
    if as_json:
        divergences = {
            f"{result.checkpoint} {result.config.name}": result.summary["test KL"].json()
            for result in results
            if result.config != UNQUANTIZED
        }
        found = {"out": str(out), "written": written, "test KL": divergences}
        print(json.dumps(found | {"failed": failures}))
    elif written:
        print(f"Report: {written['html']}")
    if failures:
        raise typer.Exit(1)


if __name__ == "__main__":
    main(sweep, "python -m quant.sweep")
