"""lm-eval's tasks on a quantized model, where their data is local.

lm-eval is not in the lock (`pip install -e '.[lm-eval]'`): it is imported where it is asked for.
"""

import functools
import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from attnserve.errors import UserError
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.intervals import Estimate, mean_interval
from attnserve.evaluation.scorers import Item, Scorer
from quant.schemes.registry import installed

NAME = "lm-eval"  # of a result's part in keys, summaries and units

SCORED = ("loglikelihood", "loglikelihood_rolling", "multiple_choice")
"""Kinds of tasks that ask how likely a text is."""


@dataclass(frozen=True)
class Harness:
    """Which tasks, and how much of them."""

    tasks: tuple[str, ...]  # their names
    include: Path | None = None  # a folder with tasks of one's own (YAML)
    limit: int | None = None  # documents of a task; None: all


@functools.cache
def key(harness: Harness) -> dict[str, Any]:
    """Return what results depend on: the tasks with their settings and documents."""
    found = {}
    for name, task in load(harness)["tasks"].items():
        documents = list(task.eval_docs)[: harness.limit]
        text = json.dumps([task.config.to_dict(), documents], sort_keys=True, default=str)
        found[name] = hashlib.sha256(text.encode()).hexdigest()[:16]
    return {"tasks": found, "limit": harness.limit}


@functools.cache
def load(harness: Harness) -> Any:
    """Return the tasks with their data, as lm-eval's `TaskManager` gives them."""
    if not installed("lm_eval"):
        raise UserError(
            "--lm-eval needs the library lm_eval, which is not installed: "
            "pip install -e '.[lm-eval]', or leave it out"
        )
    if os.environ.get("HF_HUB_OFFLINE") != "1":
        raise UserError("--lm-eval reads local data only: set HF_HUB_OFFLINE=1, or leave it out")
    if harness.include is not None and not harness.include.is_dir():
        raise UserError(
            f"{harness.include} is no folder: name one with tasks for --lm-eval-include"
        )
    from lm_eval.tasks import TaskManager

    # lm-eval's own are thousands of files to read: only where tasks of one's own are not all.
    for defaults in (False, True):
        manager = TaskManager(include_path=harness.include, include_defaults=defaults)
        unknown = [name for name in harness.tasks if not manager.match_tasks([name])]
        if not unknown:
            break
    else:
        raise UserError(
            f"lm-eval has no task {unknown[0]!r}: name one of `lm-eval ls tasks`, or its folder "
            "with --lm-eval-include"
        )
    try:
        loaded = manager.load(list(harness.tasks))
    except Exception as error:  # whatever datasets and hub clients raise without network
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"lm-eval cannot load {', '.join(harness.tasks)} from local data "
            f"({type(error).__name__}: {reason}): put it into the Hugging Face cache, or leave it "
            "out"
        ) from error
    for name, task in loaded["tasks"].items():
        if task.OUTPUT_TYPE not in SCORED:
            raise UserError(
                f"lm-eval's {name} lets the model write ({task.OUTPUT_TYPE}): the sweep scores "
                "texts only, leave it out"
            )
    return loaded


def run(
    harness: Harness, checkpoint: Checkpoint, scorer: Scorer
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """Run every task.

    Returns:
        Metrics with intervals over documents (infinite where a metric is no mean of them), and what
        was measured on each document, by task and metric.
    """
    from lm_eval import evaluator

    found = evaluator.evaluate(
        model(checkpoint, scorer), load(harness), limit=harness.limit, bootstrap_iters=0
    )
    summary: dict[str, Estimate] = {}
    units: dict[str, dict[str, list[float]]] = {}
    for task, metrics in found["results"].items():
        for label, value in metrics.items():
            metric, _, chosen = label.partition(",")
            if not chosen or not isinstance(value, float | int) or metric.endswith("_stderr"):
                continue
            each = values(found["samples"].get(task, ()), metric, chosen)
            name = metric if chosen == "none" else label
            estimate = Estimate(float(value), -np.inf, np.inf)
            if each and np.isclose(np.mean(each), value):
                estimate = mean_interval(each)
                units.setdefault(task, {})[name] = each
            summary[f"{NAME}: {task} {name}"] = estimate
    return summary, units


def values(samples: Iterable[dict[str, Any]], metric: str, chosen: str) -> list[float]:
    """Return a metric's value for each document, in their order; none if it has no numbers."""
    mine = sorted((s for s in samples if s["filter"] == chosen), key=lambda s: s["doc_id"])
    found = [sample.get(metric) for sample in mine]
    if not all(isinstance(value, float | int | np.number) for value in found):
        return []
    return [float(value) for value in found if value is not None]


def changes(units: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Estimate]:
    """Return what quantization changed, document by document."""
    return {
        f"{NAME}: {task} {metric} change": mean_interval(np.subtract(each, baseline[task][metric]))
        for task, metrics in units.items()
        for metric, each in metrics.items()
    }


def model(checkpoint: Checkpoint, scorer: Scorer) -> Any:
    """Return what lm-eval calls a model.

    Texts begin with the begin-of-text token, as in training, and are cut on the left to the length
    that the sweep measures with.
    """
    from lm_eval.api.model import TemplateLM
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    class ScoredModel(TemplateLM):
        @property
        def eot_token_id(self) -> int:
            """What stands before a text that has nothing before it."""
            return checkpoint.bos

        def tok_encode(
            self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
        ) -> list[int]:
            """Return token ids, with the first one only where lm-eval leaves that to the model."""
            first = [checkpoint.bos] if add_special_tokens is None else []
            return first + checkpoint.encode(string)

        def _loglikelihood_tokens(
            self, requests: list[tuple[Any, list[int], list[int]]], **kwargs: Any
        ) -> list[tuple[float, bool]]:
            items = []
            for _, context, continuation in requests:
                count = len(continuation)
                if count >= checkpoint.context:
                    raise ValueError(
                        f"lm-eval asks for {count} tokens at once: --length is too short"
                    )
                tokens = (context + continuation)[-checkpoint.context :]
                items.append(Item(tokens[:-count], tokens[-count:]))
            scores = scorer.score(items, NAME)
            return [(scored.total, bool(scored.greedy.all())) for scored in scores]

        def loglikelihood_rolling(
            self, requests: list[Any], disable_tqdm: bool = False
        ) -> list[float]:
            """Score whole texts, in windows that do not overlap."""
            found = []
            for request in requests:
                tokens = checkpoint.encode(request.args[0])
                windows = get_rolling_token_windows(
                    tokens, checkpoint.bos, checkpoint.context - 1, context_len=1
                )
                pairs = [(None, *make_disjoint_window(window)) for window in windows]
                found.append(sum(total for total, _ in self._loglikelihood_tokens(pairs)))
            return found

        def generate_until(self, requests: Any, disable_tqdm: bool = False) -> list[str]:
            """Refuse, as `load` does before: no such task gets here."""
            raise NotImplementedError("tasks that write text are refused when they are loaded")

    return ScoredModel()
