"""One config measured: the model quantized, and everything that is asked of it."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Cache, PreTrainedModel

from attnserve import machine
from attnserve.evaluation.books import split
from attnserve.evaluation.checkpoint import Checkpoint, digest
from attnserve.evaluation.intervals import Estimate, Z, mean_interval
from attnserve.evaluation.measures import Data
from attnserve.evaluation.perplexity import score_text
from attnserve.evaluation.scorers import Scorer, load
from attnserve.evaluation.tasks import Blimp, Lambada
from quant import lm_eval_tasks
from quant.activations import Activations, QuantizedCache, cache_bytes
from quant.config import QuantConfig
from quant.model import largest_inputs, linears, quantize, stored_bytes
from quant.outliers import input_outliers, weight_outliers
from quant.samples import Samples, Subject
from quant.schemes.registry import get_scheme
from quant.scorer import Comparison, Recorder, WatchedScorer, Watcher
from quant.texts import (
    Sources,
    Text,
    calibration_text,
    fingerprint,
    measured_texts,
    set_files,
)

NUMERICS = 1
"""Goes up when a change of the code changes results, so that older ones are not taken for new."""


@dataclass(frozen=True)
class Task:
    """A config of a checkpoint, with all that is needed to measure it in another process.

    Args:
        folder: the checkpoint.
        config: what to quantize.
        samples: how much to measure.
        texts: what to measure and calibrate on.
        records: folder for the log-probabilities of unquantized models.
        key: what the result depends on.
        baseline: the unquantized model's `units`; None if this is it.
        harness: lm-eval's tasks; None: none.
    """

    folder: Path
    config: QuantConfig
    samples: Samples
    texts: Texts
    records: Path
    key: dict[str, Any]
    baseline: dict[str, Any] | None = None
    harness: lm_eval_tasks.Harness | None = None

    @property
    def name(self) -> str:
        """For people: `softpick weights-gptq-w3-g64`."""
        return f"{self.folder.resolve().name} {self.config.name}"


@dataclass(frozen=True)
class Texts:
    """What a checkpoint is measured and calibrated on.

    Args:
        measured: by name; `test` is the main one.
        calibration: for calibrated schemes, static scales and outliers.
        sets: the folder of BLiMP and LAMBADA; None: they are not measured.
        key: a hash of all of it.
    """

    measured: dict[str, Text]
    calibration: Text
    sets: Path | None
    key: str

    @property
    def titles(self) -> dict[str, str]:
        """As results keep them."""
        return {"measured": self.measured["test"].title, "calibration": self.calibration.title}


def texts_of(sources: Sources, subject: Subject, samples: Samples) -> Texts:
    """Return all texts for a checkpoint, sampled where none is given.

    Raises:
        UserError, FileNotFoundError, ValueError: one is missing or too short.
    """
    sets = [] if sources.sets is None else set_files(sources.sets)
    measured = measured_texts(sources, subject, samples.sequences)
    calibration = calibration_text(sources, subject, samples.calibration, samples.seed)
    if sources.books is not None and sets:
        # As the committed results have it.
        books = split(sources.books)
        key = digest(*books.train, *sorted({books.validation, books.test, *sets}))
    else:
        key = f"{fingerprint([*measured.values(), calibration])}{digest(*sets) if sets else ''}"
    return Texts(measured, calibration, sources.sets, key)


@functools.lru_cache(maxsize=1)
def subject(folder: Path, length: int, digest: str) -> Subject:
    """The checkpoint of the last call is kept; its digest tells when it has changed."""
    return Subject(folder, length)


def key_of(
    checkpoint: Checkpoint,
    config: QuantConfig,
    samples: Samples,
    texts: Texts,
    harness: lm_eval_tasks.Harness | None = None,
) -> dict[str, Any]:
    """What a result depends on.

    Raises:
        UserError: lm-eval cannot do what is asked of it.
    """
    asked = {} if harness is None else {lm_eval_tasks.NAME: lm_eval_tasks.key(harness)}
    return {
        "checkpoint": checkpoint.digest,
        "config": dataclasses.asdict(config),
        "samples": dataclasses.asdict(samples),
        "texts": texts.key,
        "numerics": NUMERICS,
        **asked,
    }


def record_folder(records: Path, name: str, key: dict[str, Any]) -> Path:
    """Where the unquantized model's log-probabilities are, for a result's key."""
    common = {part: value for part, value in key.items() if part != "config"}
    text = json.dumps(common, sort_keys=True)
    return records / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def measure(task: Task) -> dict[str, Any]:
    """Measure a config.

    Returns:
        The result as it is stored (`quant.store`).

    Raises:
        ValueError: the texts are too short.
    """
    start = time.monotonic()
    torch.manual_seed(task.samples.seed)
    checkpoint = subject(task.folder, task.samples.length, task.key["checkpoint"])
    record = record_folder(task.records, checkpoint.name, task.key)
    summary: dict[str, Estimate] = {}
    details: dict[str, Any] = {}
    if not record.exists() and task.config != QuantConfig():
        measure(dataclasses.replace(task, config=QuantConfig(), baseline=None))
    model, size, cache = quantized_model(checkpoint, task)
    size["checkpoint_bytes"] = sum(f.stat().st_size for f in task.folder.glob("*.safetensors"))
    watcher: Watcher
    if task.config == QuantConfig():
        watcher = recorder = Recorder(record)
    else:
        watcher = comparison = Comparison(record)
    units: dict[str, Any] = {}
    scorer: Scorer = WatchedScorer(model, cache, watcher)
    units["perplexity"] = {}
    for name, text in task.texts.measured.items():
        figures, units["perplexity"][name] = score_text(checkpoint, scorer, name, text.pieces)
        summary |= {f"perplexity: {figure}": value for figure, value in figures.items()}
    if task.texts.sets is not None:
        data = Data(task.texts.sets, task.texts.sets)  # they have no books
        for one in (Blimp(task.samples.pairs), Lambada(task.samples.passages)):
            result = one.run(checkpoint, data, scorer)
            summary |= {f"{one.name}: {figure}": value for figure, value in result.summary.items()}
            units[one.name] = result.units
    if task.harness is not None:
        figures, units[lm_eval_tasks.NAME] = lm_eval_tasks.run(task.harness, checkpoint, scorer)
        summary |= figures
    if task.config == QuantConfig():
        recorder.close()
        found, details = outliers(checkpoint, model, task)
        summary |= found
    else:
        summary |= comparison.summary()
        details |= comparison.details()
        if task.baseline is not None:
            summary |= changes(units, task.baseline)
    return {
        "checkpoint": checkpoint.name,
        "variant": checkpoint.variant,
        "context": checkpoint.context,
        "key": task.key,
        "texts": task.texts.titles,
        "machine": machine.summary(),
        "seconds": round(time.monotonic() - start, 1),
        "size": size,
        "summary": {name: estimate.json() for name, estimate in summary.items()},
        "details": details,
        "units": units,
    }


def quantized_model(
    checkpoint: Checkpoint, task: Task
) -> tuple[PreTrainedModel, dict[str, int], Callable[[], Cache] | None]:
    """The model, its sizes, and what makes its caches if those are quantized."""
    config = task.config
    model = load(checkpoint.folder)
    texts = task.texts.calibration.rows(checkpoint.bos)
    stored = {}
    if config.scheme is not None:
        scheme = get_scheme(config.scheme)
        stored = quantize(model, scheme, config.spec, texts, config.lm_head, config.act_order)
    if config.activations is not None:
        layers = linears(model, config.lm_head)
        largest = largest_inputs(model, layers, texts) if config.static else {}
        Activations(config.activations, config.static).attach(layers, largest)
    cache, symmetric = None, config.symmetric and config.weights is None
    if config.kv is not None:
        cache = functools.partial(QuantizedCache, model.config, config.kv, symmetric)
    item = (checkpoint.config.dtype or torch.float32).itemsize
    size = {
        "bytes": stored_bytes(model, stored, item),
        "quantized_bytes": sum(weight.packed_bytes for weight in stored.values()),
        "quantized_numbers": sum(weight.values.numel() for weight in stored.values()),
        "cache_bytes_per_token": cache_bytes(model.config, config.kv, symmetric, item),
    }
    return model, size, cache


def outliers(
    checkpoint: Checkpoint, model: PreTrainedModel, task: Task
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """Outliers of an unquantized model's weights and linear inputs, on calibration texts."""
    layers = linears(model)
    weights = weight_outliers(layers)
    texts = task.texts.calibration.rows(checkpoint.bos)
    summary, inputs = input_outliers(model, layers, texts)
    return summary, {"weight outliers": weights, "input outliers": inputs}


def changes(units: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Estimate]:
    """What quantization changed, text by text: losses in nats, shares."""
    found = {}
    for text, before in baseline["perplexity"].items():
        new, old = (u["sequence_losses"] for u in (units["perplexity"][text], before))
        found[f"{text} loss change"] = mean_interval(np.subtract(new, old))
    if "lambada" in units:
        new, old = units["lambada"], baseline["lambada"]
        found["lambada accuracy change"] = mean_interval(np.subtract(new["hits"], old["hits"]))
        found["lambada loss change"] = mean_interval(np.subtract(new["losses"], old["losses"]))
    if "blimp" in units:
        sets = [
            np.subtract(units["blimp"]["correct"][name], correct)
            for name, correct in baseline["blimp"]["correct"].items()
        ]
        # The sets are fixed and their pairs are the sample, as for BLiMP's mean itself.
        mean = float(np.mean([each.mean() for each in sets]))
        half = Z * float(np.sqrt(sum(each.var(ddof=1) / len(each) for each in sets))) / len(sets)
        found["blimp change"] = Estimate(mean, mean - half, mean + half)
    if lm_eval_tasks.NAME in units:
        found |= lm_eval_tasks.changes(*(u[lm_eval_tasks.NAME] for u in (units, baseline)))
    return found
