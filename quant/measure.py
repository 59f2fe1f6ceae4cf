"""One cell measured: the model quantized, and everything that is asked of it."""

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

from quant import lm_eval_tasks
from quant.activations import Activations, QuantizedCache, cache_bytes
from quant.cell import Cell
from quant.model import largest_inputs, linears, quantize, stored_bytes
from quant.outliers import input_outliers, weight_outliers
from quant.schemes.registry import get_scheme
from quant.scorer import Comparison, Recorder, WatchedScorer, Watcher
from quant.texts import calibration
from training.analyze.blimp import Blimp
from training.analyze.intervals import Estimate, Z, mean_interval
from training.analyze.lambada import Lambada
from training.analyze.measure import Checkpoint, Data, Measure, digest
from training.analyze.perplexity import TEXTS, Perplexity
from training.analyze.scorer import Scorer
from training.analyze.transformers_scorer import load
from training.books import split
from training.card import machine

NUMERICS = 1
"""Goes up when a change of the code changes results, so that older ones are not taken for new."""


@dataclass(frozen=True)
class Samples:
    """How much is measured.

    Args:
        sequences: of each of the three texts, for perplexity and divergence.
        length: tokens of a sequence; at most the training length is used.
        pairs: of each BLiMP set.
        passages: of LAMBADA.
        calibration: sequences of training text for GPTQ and static scales.
        seed: of the calibration's places.
    """

    sequences: int = 16
    length: int = 512
    pairs: int = 50
    passages: int = 100
    calibration: int = 16
    seed: int = 0

    def measures(self) -> list[Measure]:
        """What is asked of every model."""
        return [Perplexity(self.sequences), Blimp(self.pairs), Lambada(self.passages)]


@dataclass(frozen=True)
class Task:
    """A cell of a checkpoint, with all that is needed to measure it in another process.

    Args:
        folder: the checkpoint.
        cell: what to quantize.
        samples: how much to measure.
        data: where the texts are.
        records: folder for the log-probabilities of unquantized models.
        key: what the result depends on.
        baseline: the unquantized model's `units`; None if this is it.
        harness: lm-eval's tasks; None: none.
    """

    folder: Path
    cell: Cell
    samples: Samples
    data: Data
    records: Path
    key: dict[str, Any]
    baseline: dict[str, Any] | None = None
    harness: lm_eval_tasks.Harness | None = None

    @property
    def name(self) -> str:
        """For people: `softpick weights-gptq-w3-g64`."""
        return f"{self.folder.resolve().name} {self.cell.name}"


class Subject(Checkpoint):
    """A checkpoint whose texts are turned into tokens once, however many cells it has."""

    def __init__(self, folder: Path, length: int) -> None:
        super().__init__(folder)
        self.context = min(length, self.context)
        self._encoded: dict[str, list[int]] = {}

    def encode(self, text: str) -> list[int]:
        """Token ids without special tokens."""
        if text not in self._encoded:
            self._encoded[text] = super().encode(text)
        return self._encoded[text]


@functools.lru_cache(maxsize=1)
def subject(folder: Path, length: int, digest: str) -> Subject:
    """The checkpoint of the last call is kept; its digest tells when it has changed."""
    return Subject(folder, length)


def key_of(
    checkpoint: Checkpoint,
    cell: Cell,
    samples: Samples,
    data: Data,
    harness: lm_eval_tasks.Harness | None = None,
) -> dict[str, Any]:
    """What a result depends on.

    Raises:
        Refusal: lm-eval cannot do what is asked of it.
    """
    asked = {} if harness is None else {lm_eval_tasks.NAME: lm_eval_tasks.key(harness)}
    return {
        "checkpoint": checkpoint.digest,
        "cell": dataclasses.asdict(cell),
        "samples": dataclasses.asdict(samples),
        "texts": texts_digest(data),
        "numerics": NUMERICS,
        **asked,
    }


@functools.cache
def texts_digest(data: Data) -> str:
    """A hash of all texts that are read."""
    files = {file for measure in Samples().measures() for file in measure.files(data)}
    return digest(*split(data.books).train, *sorted(files))


def record_folder(records: Path, name: str, key: dict[str, Any]) -> Path:
    """Where the unquantized model's log-probabilities are, for a result's key."""
    common = {part: value for part, value in key.items() if part != "cell"}
    text = json.dumps(common, sort_keys=True)
    return records / f"{name}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"


def measure(task: Task) -> dict[str, Any]:
    """Measure a cell.

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
    if not record.exists() and task.cell != Cell():
        measure(dataclasses.replace(task, cell=Cell(), baseline=None))
    model, size, cache = quantized_model(checkpoint, task)
    size["checkpoint_bytes"] = sum(f.stat().st_size for f in task.folder.glob("*.safetensors"))
    watcher: Watcher
    if task.cell == Cell():
        watcher = recorder = Recorder(record)
    else:
        watcher = comparison = Comparison(record)
    units: dict[str, Any] = {}
    scorer: Scorer = WatchedScorer(model, cache, watcher)
    for one in task.samples.measures():
        result = one.run(checkpoint, task.data, scorer)
        summary |= {f"{one.name}: {figure}": value for figure, value in result.summary.items()}
        units[one.name] = result.units
    if task.harness is not None:
        figures, units[lm_eval_tasks.NAME] = lm_eval_tasks.run(task.harness, checkpoint, scorer)
        summary |= figures
    if task.cell == Cell():
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
        "machine": machine(),
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
    cell, samples = task.cell, task.samples
    model = load(checkpoint.folder)
    texts = torch.empty(0, dtype=torch.long)
    if cell.calibrated:
        texts = calibration(checkpoint, task.data.books, samples.calibration, samples.seed)
    stored = {}
    if cell.scheme is not None:
        scheme = get_scheme(cell.scheme)
        stored = quantize(model, scheme, cell.grid, texts, cell.lm_head, cell.act_order)
    if cell.activations is not None:
        layers = linears(model, cell.lm_head)
        largest = largest_inputs(model, layers, texts) if cell.static else {}
        Activations(cell.activations, cell.static).attach(layers, largest)
    cache, symmetric = None, cell.symmetric and cell.weights is None
    if cell.kv is not None:
        cache = functools.partial(QuantizedCache, model.config, cell.kv, symmetric)
    item = (checkpoint.config.dtype or torch.float32).itemsize
    size = {
        "bytes": stored_bytes(model, stored, item),
        "quantized_bytes": sum(weight.packed_bytes for weight in stored.values()),
        "quantized_numbers": sum(weight.codes.numel() for weight in stored.values()),
        "cache_bytes_per_token": cache_bytes(model.config, cell.kv, symmetric, item),
    }
    return model, size, cache


def outliers(
    checkpoint: Checkpoint, model: PreTrainedModel, task: Task
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """Outliers of an unquantized model's weights and linear inputs, on calibration texts."""
    layers = linears(model)
    weights = weight_outliers(layers)
    samples = task.samples
    texts = calibration(checkpoint, task.data.books, samples.calibration, samples.seed)
    summary, inputs = input_outliers(model, layers, texts)
    return summary, {"weight outliers": weights, "input outliers": inputs}


def changes(units: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Estimate]:
    """What quantization changed, text by text: losses in nats, shares."""
    found = {}
    for text in TEXTS:
        new, old = (u["perplexity"][text]["sequence_losses"] for u in (units, baseline))
        found[f"{text} loss change"] = mean_interval(np.subtract(new, old))
    new, old = units["lambada"], baseline["lambada"]
    found["lambada accuracy change"] = mean_interval(np.subtract(new["hits"], old["hits"]))
    found["lambada loss change"] = mean_interval(np.subtract(new["losses"], old["losses"]))
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
