"""Run a sweep: measure what is not measured yet, and keep each result when it is done."""

import dataclasses
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from attnserve.errors import UserError
from attnserve.evaluation.checkpoint import Checkpoint
from quant import lm_eval_tasks, pool, store
from quant.checks import check_no_experts, check_values
from quant.config import UNQUANTIZED, QuantConfig, Samples
from quant.lm_eval_tasks import Harness
from quant.measure import SweepTask, measure
from quant.model import columns, empty_model
from quant.schemes.registry import get_scheme
from quant.store import SweepResult
from quant.texts import Sources, sweep_texts
from quant.write import check_unquantized

WORKER_BYTES = 700 * 2**20  # what a worker holds besides its model: mostly torch and transformers
BATCH_TOKENS = 2048


def plan(
    folders: Sequence[Path],
    configs: Sequence[QuantConfig],
    samples: Samples,
    sources: Sources,
    out: Path,
    harness: Harness | None = None,
) -> list[SweepTask]:
    """Return the tasks of all checkpoints, checked: the unquantized model and `configs` of each.
    Whatever text is not given is sampled."""
    names = [folder.resolve().name for folder in folders]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"two checkpoints are called {min(twice)}: their results would clash")
    for folder in folders:
        check_configs(folder, configs)
    if harness is not None:
        lm_eval_tasks.key(harness)  # refuses what cannot be done
    tasks = []
    for folder, its_sources in sources.for_checkpoints(folders).items():
        checkpoint = Checkpoint(folder, longest=samples.length)
        texts = sweep_texts(its_sources, checkpoint, samples)
        first = SweepTask(folder, checkpoint.digest, UNQUANTIZED, samples, texts, out, harness)
        tasks += [first, *(dataclasses.replace(first, config=config) for config in configs)]
    return tasks


def check_configs(folder: Path, configs: Sequence[QuantConfig]) -> None:
    """Check that a checkpoint can be quantized, and that every scheme can do its configs."""
    model = empty_model(folder)
    check_unquantized(folder)
    check_no_experts(folder, model)
    check_values(folder, model)
    for config in configs:
        if config.scheme is not None:
            get_scheme(config.scheme).check(config.spec, columns(model, config.lm_head))


def affordable(jobs: int, folders: Sequence[Path]) -> int:
    """Return as many of the jobs as fit into the memory that is free, at least one."""
    largest = 0
    for folder in folders:
        model = empty_model(folder)
        logits = 3 * BATCH_TOKENS * model.config.vocab_size
        largest = max(largest, 4 * (2 * sum(p.numel() for p in model.parameters()) + logits))
    fitting = int(psutil.virtual_memory().available // (WORKER_BYTES + largest))
    return max(1, min(jobs, fitting))


def prepare(jobs: int) -> None:
    """Give a worker its share of the cores."""
    torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // jobs))


def is_there(task: SweepTask) -> bool:
    """Return whether a task's result is there already."""
    if not task.path.exists():
        return False
    stored, key = store.read(task.path), task.key
    if stored.key != key:
        differing = [k for k in {**key, **stored.key} if key.get(k) != stored.key.get(k)]
        texts = [", ".join(found.values()) for found in (stored.texts, task.texts.titles)]
        said = f" ({texts[0]}; now {texts[1]})" if texts[0] != texts[1] else ""
        raise UserError(
            f"{task.path} holds a result that differs in {', '.join(differing)}{said}: --force "
            "measures again and replaces it, --out DIR writes elsewhere"
        )
    return True


def run(
    tasks: Sequence[SweepTask], jobs: int, ray: bool, show: Callable[[SweepResult], None]
) -> dict[str, str]:
    """Measure tasks, the unquantized models first, and write each result when it is done.

    It is done by `jobs` processes of this machine, or on a Ray cluster; `show` is called with
    each result.

    Returns:
        The names of failed tasks, and why they failed.
    """
    failures: dict[str, str] = {}
    with tqdm(total=len(tasks), unit="config", smoothing=0.1) as bar:

        def measure_all(ready: Sequence[SweepTask]) -> None:
            if ray:
                outcomes = pool.on_ray(measure, ready)
            elif jobs == 1:
                outcomes = pool.serial(measure, ready)
            else:
                outcomes = pool.parallel(measure, ready, jobs, prepare)
            for task, outcome in outcomes:
                if isinstance(outcome, pool.Failure):
                    failures[task.name] = outcome.why
                else:
                    store.write(task.path, outcome)
                    with bar.external_write_mode():
                        show(store.read(task.path))  # as it is shown ever after
                bar.set_postfix_str(task.name)
                bar.update()

        measure_all([task for task in tasks if task.config == UNQUANTIZED])
        ready = []
        for task in tasks:
            unquantized = dataclasses.replace(task, config=UNQUANTIZED)
            if task.config == UNQUANTIZED:
                continue
            if unquantized.path.exists() and unquantized.name not in failures:
                ready.append(task)
            else:
                failures[task.name] = "the unquantized model could not be measured"
                bar.update()
        measure_all(ready)
    return failures
