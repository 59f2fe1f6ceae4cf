"""Measure what 2 to 8 bits cost, for checkpoints, schemes and targets."""

import json
import os
import sys
from pathlib import Path
from typing import Annotated

import typer

from attnserve.command import AsJson, expanded, main, needs, options_of
from attnserve.errors import UserError
from attnserve.evaluation.arguments import Texts
from attnserve.files import check_writable
from quant import options
from quant.config import UNQUANTIZED, Samples, SearchSpace
from quant.schemes.registry import installed


@options_of(SearchSpace, Samples)
@needs("quant")
def sweep(
    checkpoints: Annotated[
        list[Path] | None,
        typer.Argument(
            help="Hugging Face folders. Default: every checkpoint that comes with the project."
        ),
    ] = None,
    *,
    space: SearchSpace,
    samples: Samples,
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
        int | None, typer.Option(min=1, metavar="N", help="Documents of a task. Default: all.")
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
        raise UserError(
            "--ray needs the library ray, which is not installed: pip install -e '.[ray]', or "
            "leave it out"
        )
    if (lm_eval_include or lm_eval_limit) and not lm_eval:
        raise UserError(
            "--lm-eval-include and --lm-eval-limit need tasks: name them with --lm-eval"
        )
    from quant import runner, store
    from quant.lm_eval_tasks import Harness
    from quant.report.frame import table
    from quant.report.write import write
    from quant.store import SweepResult
    from quant.texts import Sources, bundled_checkpoints, explained

    folders = [expanded(folder) for folder in checkpoints or bundled_checkpoints()]
    if not folders:
        raise UserError(
            "name a checkpoint's folder: only a checkout of the project has checkpoints of its own"
        )
    check_writable(out)
    tasks = runner.plan(
        folders,
        space.configs(),
        samples,
        Sources(text or (), calibration_text or (), books, evaluation, text_from),
        out,
        Harness(tuple(lm_eval), lm_eval_include, lm_eval_limit) if lm_eval else None,
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
