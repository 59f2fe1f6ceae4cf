"""Measure what few bits cost: checkpoints x what is quantized x schemes x bits x groups.

    python -m quant.sweep --bits 2 3 4 8
    python -m quant.sweep my-checkpoint --bits 3 4 --text mine.txt --calibration-text other.txt

Where no text is named, the unquantized checkpoint writes it, the same for all checkpoints of one
tokenizer. Rows are printed as cells are done; the report comes at the end.
Each config is a file, configs/CHECKPOINT/CONFIG.json under --out, written when it is done: a sweep
that was killed goes on where it was when the command is given again. The unquantized model is
measured first; every config is compared with it, text by text.
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
from attnserve.errors import UserError
from quant import pool, store
from quant.config import QuantConfig, SearchSpace
from quant.lm_eval_tasks import Harness
from quant.measure import Task, key_of, measure, texts_of
from quant.model import empty_model, linears
from quant.options import bundled_checkpoints, sources_of
from quant.report.frame import Rows
from quant.report.write import write
from quant.samples import Samples, Subject
from quant.schemes.registry import get_scheme, installed
from quant.sweep_options import parser
from quant.texts import Sources, explained

WORKER_BYTES = 700 * 2**20
"""What a worker holds besides its model: mostly torch and transformers."""
BATCH_TOKENS = 2048


def check_cells(folder: Path, chosen: Sequence[QuantConfig], lm_head: bool) -> None:
    """Every scheme can do its cells of a checkpoint.

    Raises:
        UserError, ValueError: one cannot, or there is no checkpoint.
    """
    if not (folder / "config.json").exists():
        raise UserError(f"{folder} has no config.json: name a checkpoint's folder")
    layers = linears(empty_model(folder), lm_head)
    columns = {layer.in_features for layer in layers.values()}
    for config in chosen:
        if config.scheme is not None:
            get_scheme(config.scheme).check(config.spec, columns)


def tasks_of(
    folder: Path, sources: Sources, chosen: Sequence[QuantConfig], options: argparse.Namespace
) -> list[Task]:
    """A checkpoint's cells, the unquantized one first.

    Raises:
        UserError, FileNotFoundError, ValueError: a text is missing or too short.
    """
    samples, harness = samples_of(options), harness_of(options)
    subject = Subject(folder, samples.length)
    texts = texts_of(sources, subject, samples)
    return [
        Task(
            folder,
            config,
            samples,
            texts,
            options.out / "records",
            key_of(subject, config, samples, texts, harness),
            harness=harness,
        )
        for config in (QuantConfig(), *chosen)
    ]


def samples_of(options: argparse.Namespace) -> Samples:
    """How much is measured."""
    names = [field.name for field in dataclasses.fields(Samples)]
    return Samples(**{name: getattr(options, name) for name in names})


def harness_of(options: argparse.Namespace) -> Harness | None:
    """lm-eval's tasks.

    Raises:
        UserError: settings without tasks.
    """
    if options.lm_eval:
        return Harness(tuple(options.lm_eval), options.lm_eval_include, options.lm_eval_limit)
    if options.lm_eval_include or options.lm_eval_limit:
        raise UserError(
            "--lm-eval-include and --lm-eval-limit need tasks: name them with --lm-eval"
        )
    return None


def is_there(task: Task, options: argparse.Namespace) -> bool:
    """Whether a task's result is there already.

    Raises:
        UserError: the file holds a result of other weights, texts or samples.
    """
    path = store.path_of(options.out, task.folder.resolve().name, task.config)
    if options.force or not path.exists():
        return False
    stored = store.read(path)
    if stored.key != task.key:
        names = {**task.key, **stored.key}
        differing = [name for name in names if task.key.get(name) != stored.key.get(name)]
        texts = [", ".join(found.values()) for found in (stored.texts, task.texts.titles)]
        said = f" ({texts[0]}; now {texts[1]})" if texts[0] != texts[1] else ""
        raise UserError(
            f"{path} holds a result that differs in {', '.join(differing)}{said}: --force measures "
            "again and replaces it, --out DIR writes elsewhere"
        )
    return True


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
    """Measure all tasks whose results are not there, and print each result as it is done; returns
    the failed ones and why."""
    there, missing = list[Task](), list[Task]()
    for task in tasks:
        (there if is_there(task, options) else missing).append(task)
    print(f"{len(missing)} configs to measure, {len(there)} there already", flush=True)
    names = [task.folder.resolve().name for task in tasks]
    rows = Rows(names, [task.config for task in tasks], options.eval is not None)
    print(rows.head)
    for stored in stored_of(there, options.out):
        print(rows.row(stored), flush=True)
    failures: dict[str, str] = {}
    with tqdm(total=len(missing), unit="config", smoothing=0.1) as bar:
        first = [task for task in missing if task.config == QuantConfig()]
        others = [task for task in missing if task.config != QuantConfig()]
        for stage in (first, others):
            if stage is others:
                stage = [t for task in stage if (t := with_baseline(task, options, failures))]
                bar.update(len(others) - len(stage))
            for task, outcome in run(stage, jobs, options.ray):
                if isinstance(outcome, pool.Failure):
                    failures[task.name] = outcome.why
                    bar.write(f"failed: {task.name}: {outcome.why}", file=sys.stderr)
                else:
                    bar.write(rows.row(store.read(store.write(options.out, outcome))))
                    sys.stdout.flush()
                bar.set_postfix_str(task.name)
                bar.update()
    return failures


def stored_of(tasks: Sequence[Task], out: Path) -> list[store.Stored]:
    """The results that there are, in the order of tables."""
    paths = [store.path_of(out, task.folder.resolve().name, task.config) for task in tasks]
    return sorted((store.read(path) for path in paths if path.exists()), key=store.order)


def with_baseline(task: Task, options: argparse.Namespace, failures: dict[str, str]) -> Task | None:
    """A task with the unquantized model's units; None, and a failure, if they are not there."""
    name = task.folder.resolve().name
    path = store.path_of(options.out, name, QuantConfig())
    if f"{name} {QuantConfig().name}" in failures or not path.exists():
        failures[task.name] = "the unquantized model could not be measured"
        return None
    return dataclasses.replace(task, baseline=store.read(path).units)


def plan(options: argparse.Namespace) -> list[Task]:
    """All tasks, checked; whatever text is not given is sampled.

    Raises:
        UserError, ValueError, OSError, VariantError: something will not do.
    """
    if options.ray and not installed("ray"):
        raise UserError("--ray needs the library ray, which is not installed: leave it out")
    fields = [field.name for field in dataclasses.fields(SearchSpace)]
    chosen = SearchSpace(**{name: getattr(options, name) for name in fields}).configs()
    options.checkpoints = options.checkpoints or bundled_checkpoints()
    names = [folder.resolve().name for folder in options.checkpoints]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two checkpoints are called {min(twice)}: their results would clash")
    harness_of(options)
    for folder in options.checkpoints:
        check_cells(folder, chosen, options.lm_head)
    tasks = [
        task
        for folder, sources in sources_of(options, options.checkpoints).items()
        for task in tasks_of(folder, sources, chosen, options)
    ]
    for task in tasks:
        is_there(task, options)
    return tasks


def main(argv: Sequence[str] | None = None) -> None:
    """The command line."""
    command = parser(__doc__)
    options = command.parse_args(argv)
    transformers.utils.logging.disable_progress_bar()
    try:
        tasks = plan(options)
    except (UserError, ValueError, OSError, VariantError) as error:
        print(f"{command.prog}: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    jobs = affordable(options.jobs, options.checkpoints)
    if jobs < options.jobs:
        print(f"memory is free for {jobs} of {options.jobs} jobs")
    for said in dict.fromkeys(explained(**task.texts.titles) for task in tasks):
        print(said)
    try:
        failures = sweep(tasks, options, jobs)
    except KeyboardInterrupt:
        print(
            f"{command.prog}: stopped; what is done is in {options.out}, and the same command goes "
            "on from there",
            file=sys.stderr,
        )
        sys.exit(130)
    results = stored_of(tasks, options.out)
    written = write(options.out) if results else {}
    for name, reason in failures.items():
        print(f"failed: {name}: {reason}", file=sys.stderr)
    if written:
        print(f"Report: {written['html']}")
    divergences = {
        f"{stored.checkpoint} {stored.config.name}": stored.summary["test KL"].json()
        for stored in results
        if stored.config != QuantConfig()
    }
    line = {"out": str(options.out), "written": written, "test KL": divergences, "failed": failures}
    print(json.dumps(line))
    if failures:
        sys.exit(1)


if __name__ == "__main__":
    main()
