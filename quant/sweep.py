"""Measure what few bits cost: checkpoints x what is quantized x schemes x bits x groups.

    python -m quant.sweep checkpoints/softmax checkpoints/softpick --bits 2 3 4 8

Each cell is a file, cells/CHECKPOINT/CELL.json under --out, written when it is done: a sweep that
was killed goes on where it was when the command is given again, and what is there is not measured
again. The unquantized model is measured first; every cell is compared with it, text by text.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import psutil
import torch
import transformers
from tqdm import tqdm

from attn_kernels import VariantError
from benchmarks.options import positive
from quant import pool, store
from quant.cell import PARTS, Cell, cells
from quant.errors import Refusal
from quant.lm_eval_tasks import Harness
from quant.measure import Samples, Task, key_of, measure
from quant.model import empty_model, linears
from quant.report.frame import table
from quant.report.write import write
from quant.schemes.registry import SCHEMES, get_scheme, installed
from quant.weight import BITS
from training.analyze.measure import EVAL, Checkpoint, Data
from training.books import BOOKS, split

WORKER_BYTES = 700 * 2**20
"""What a worker holds besides its model: mostly torch and transformers."""
BATCH_TOKENS = 2048


def tasks_of(
    checkpoint: Checkpoint, chosen: Sequence[Cell], options: argparse.Namespace
) -> list[Task]:
    """A checkpoint's cells, the unquantized one first.

    Raises:
        Refusal: a scheme cannot do a cell.
    """
    layers = linears(empty_model(checkpoint.folder), options.lm_head)
    columns = {layer.in_features for layer in layers.values()}
    for cell in chosen:
        if cell.scheme is not None:
            get_scheme(cell.scheme).check(cell.grid, columns)
    samples = Samples(
        **{field.name: getattr(options, field.name) for field in dataclasses.fields(Samples)}
    )
    data, harness = Data(options.books, options.eval), harness_of(options)
    return [
        Task(
            checkpoint.folder,
            cell,
            samples,
            data,
            options.out / "records",
            key_of(checkpoint, cell, samples, data, harness),
            harness=harness,
        )
        for cell in (Cell(), *chosen)
    ]


def harness_of(options: argparse.Namespace) -> Harness | None:
    """lm-eval's tasks.

    Raises:
        Refusal: settings without tasks.
    """
    if options.lm_eval:
        return Harness(tuple(options.lm_eval), options.lm_eval_include, options.lm_eval_limit)
    if options.lm_eval_include or options.lm_eval_limit:
        raise Refusal("--lm-eval-include and --lm-eval-limit need tasks: name them with --lm-eval")
    return None


def is_there(task: Task, options: argparse.Namespace) -> bool:
    """Whether a task's result is there already.

    Raises:
        Refusal: the file holds a result of other weights, texts or samples.
    """
    path = store.path_of(options.out, task.folder.resolve().name, task.cell)
    if options.force or not path.exists():
        return False
    key = store.read(path).key
    if key != task.key:
        names = {**task.key, **key}
        differing = ", ".join(name for name in names if task.key.get(name) != key.get(name))
        raise Refusal(
            f"{path} holds a result with another {differing}: --force measures again and "
            "replaces it, --out DIR writes elsewhere"
        )
    return True


def check_data(data: Data) -> None:
    """Every text is there.

    Raises:
        Refusal, FileNotFoundError: one is not.
    """
    split(data.books)
    for one in Samples().measures():
        files = one.files(data)
        for file in files:
            if not file.exists():
                raise Refusal(f"{file} is not there: name its folder with --eval or --books")
        if not files:
            raise Refusal(f"{data.evaluation} has no files for {one.name}: name it with --eval")


def affordable(jobs: int, folders: Sequence[Path]) -> int:
    """As many of the jobs as fit into the memory that is free, one at least."""
    largest = 0
    for folder in folders:
        model = empty_model(folder)
        logits = 3 * BATCH_TOKENS * model.config.vocab_size
        largest = max(largest, 4 * (2 * sum(p.numel() for p in model.parameters()) + logits))
    fitting = int(psutil.virtual_memory().available // (WORKER_BYTES + largest))
    return max(1, min(jobs, fitting))


def run(
    tasks: Sequence[Task], jobs: int, ray: bool
) -> Iterator[pool.Outcome[Task, dict[str, Any]]]:
    """Measure tasks wherever the options say."""
    if ray:
        return pool.on_ray(measure, tasks)
    if jobs == 1:
        return pool.serial(measure, tasks)
    return pool.parallel(measure, tasks, jobs, prepare)


def prepare(jobs: int) -> None:
    """A worker's share of the cores."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // jobs))
    transformers.utils.logging.disable_progress_bar()


def sweep(tasks: Sequence[Task], options: argparse.Namespace, jobs: int) -> dict[str, str]:
    """Measure all tasks whose results are not there; returns the failed ones and why."""
    missing = [task for task in tasks if not is_there(task, options)]
    print(f"{len(missing)} cells to measure, {len(tasks) - len(missing)} there already", flush=True)
    failures: dict[str, str] = {}
    with tqdm(total=len(missing), unit="cell", smoothing=0.1) as bar:
        first = [task for task in missing if task.cell == Cell()]
        others = [task for task in missing if task.cell != Cell()]
        for stage in (first, others):
            if stage is others:
                stage = [t for task in stage if (t := with_baseline(task, options, failures))]
                bar.update(len(others) - len(stage))
            for task, outcome in run(stage, jobs, options.ray):
                if isinstance(outcome, pool.Failure):
                    failures[task.name] = outcome.why
                    bar.write(f"failed: {task.name}: {outcome.why}", file=sys.stderr)
                else:
                    store.write(options.out, outcome)
                bar.set_postfix_str(task.name)
                bar.update()
    return failures


def with_baseline(task: Task, options: argparse.Namespace, failures: dict[str, str]) -> Task | None:
    """A task with the unquantized model's units; None, and a failure, if they are not there."""
    name = task.folder.resolve().name
    path = store.path_of(options.out, name, Cell())
    if f"{name} {Cell().name}" in failures or not path.exists():
        failures[task.name] = "the unquantized model could not be measured"
        return None
    return dataclasses.replace(task, baseline=store.read(path).units)


def group(text: str) -> int | None:
    """Columns of a group, or `channel`, for argparse."""
    return None if text == "channel" else positive(text)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m quant.sweep",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("checkpoints", nargs="+", type=Path, help="Hugging Face folders")
    add(
        "--bits",
        nargs="+",
        type=int,
        default=[2, 3, 4, 8],
        help=f"widths from {BITS[0]} to {BITS[-1]} of what is named first in --what "
        "(default: 2 3 4 8)",
    )
    titles = "; ".join(f"{name}: {scheme.title}" for name, scheme in SCHEMES.items())
    add(
        "--schemes",
        nargs="+",
        default=["rtn", "hqq", "gptq"],
        metavar="SCHEME",
        help=f"of weights. {titles} (default: rtn hqq gptq)",
    )
    add(
        "--what",
        nargs="+",
        default=["weights", "weights+activations", "kv"],
        help=f"what is quantized: {', '.join(PARTS)}, or several joined by +; activations are the "
        "inputs of linear layers, kv the cache (default: weights weights+activations kv)",
    )
    add(
        "--groups",
        nargs="+",
        type=group,
        default=[64],
        metavar="GROUP",
        help="columns of the weights that share a scale, or channel (default: 64)",
    )
    add("--symmetric", action="store_true", help="no zero points (default: with)")
    add("--act-order", action="store_true", help="gptq takes columns by their Hessian")
    add("--lm-head", action="store_true", help="quantize the head's weights too")
    add("--static", action="store_true", help="calibrated scales of activations, not one a token")
    add(
        "--activation-bits",
        type=int,
        default=8,
        help="of activations beside weights (default: %(default)s)",
    )
    add("--kv-bits", type=int, default=8, help="of the cache beside others (default: %(default)s)")
    units = {
        "sequences": "of each text, for perplexity and divergence",
        "length": "tokens of a sequence; the training length at most",
        "pairs": "of each BLiMP set",
        "passages": "of LAMBADA",
        "calibration": "sequences of training text to calibrate on",
    }
    for name, text in units.items():
        default = getattr(Samples(), name)
        add(f"--{name}", type=positive, default=default, help=f"{text} (default: {default})")
    add(
        "--lm-eval",
        nargs="+",
        default=[],
        metavar="TASK",
        help="tasks of lm-eval too, where their data is local: pip install -e '.[lm-eval]', "
        "HF_HUB_OFFLINE=1 (default: none)",
    )
    add("--lm-eval-include", type=Path, metavar="DIR", help="folder with tasks of your own (YAML)")
    add("--lm-eval-limit", type=positive, metavar="N", help="documents of a task (default: all)")
    add("--seed", type=int, default=0, help="of the calibration's places (default: %(default)s)")
    add(
        "--jobs",
        type=positive,
        default=len(os.sched_getaffinity(0)),
        help="processes; fewer if memory is short (default: one a core, %(default)s)",
    )
    add(
        "--ray",
        action="store_true",
        help="spread cells over the Ray cluster that RAY_ADDRESS names, which must see the same "
        "folders; --jobs has no meaning then",
    )
    add("--books", type=Path, default=BOOKS, help="folder (default: %(default)s)")
    add("--eval", type=Path, default=EVAL, help="folder of the sets (default: %(default)s)")
    add("--out", type=Path, default=store.FOLDER, help="folder (default: %(default)s)")
    add("--force", action="store_true", help="measure again what is there")
    return made


def plan(options: argparse.Namespace) -> list[Task]:
    """All tasks, checked.

    Raises:
        Refusal, ValueError, FileNotFoundError, VariantError: something will not do.
    """
    if options.ray and not installed("ray"):
        raise Refusal("--ray needs the library ray, which is not installed: leave it out")
    chosen = cells(
        options.what,
        options.schemes,
        options.bits,
        options.groups,
        options.symmetric,
        options.act_order,
        options.lm_head,
        options.static,
        options.activation_bits,
        options.kv_bits,
    )
    check_data(Data(options.books, options.eval))
    names = [folder.resolve().name for folder in options.checkpoints]
    if twice := {name for name in names if names.count(name) > 1}:
        raise Refusal(f"two checkpoints are called {min(twice)}: their results would clash")
    checkpoints = [Checkpoint(folder) for folder in options.checkpoints]
    tasks = [task for one in checkpoints for task in tasks_of(one, chosen, options)]
    for task in tasks:
        is_there(task, options)
    return tasks


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command = parser()
    options = command.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        tasks = plan(options)
    except (Refusal, ValueError, FileNotFoundError, VariantError) as error:
        print(f"{command.prog}: {error}", file=sys.stderr)
        sys.exit(2)
    jobs = affordable(options.jobs, options.checkpoints)
    if jobs < options.jobs:
        print(f"memory is free for {jobs} of {options.jobs} jobs")
    failures = sweep(tasks, options, jobs)
    paths = [store.path_of(options.out, t.folder.resolve().name, t.cell) for t in tasks]
    results = sorted((store.read(path) for path in paths if path.exists()), key=store.order)
    print(table(results))
    written = write(options.out) if results else {}
    for name, reason in failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    divergences = {
        f"{stored.checkpoint} {stored.cell.name}": stored.summary["test KL"].json()
        for stored in results
        if stored.cell != Cell()
    }
    line = {"out": str(options.out), "written": written, "test KL": divergences, "failed": failures}
    print(json.dumps(line))
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
