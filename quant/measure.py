"""Measure one config: quantize the model and compare it with the unquantized one."""

import dataclasses
import functools
import hashlib
import json
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from attnserve import machine
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.intervals import Estimate, Z, mean_interval
from attnserve.evaluation.measures import Data
from attnserve.evaluation.perplexity import score_text
from attnserve.evaluation.scorers import load
from attnserve.evaluation.tasks import Blimp, Lambada
from quant import lm_eval_tasks
from quant.activations import cache_bytes, quantize_cache, quantize_inputs
from quant.config import UNQUANTIZED, QuantConfig, Samples
from quant.model import largest_inputs, linears, quantize, stored_bytes
from quant.outliers import input_outliers, weight_outliers
from quant.schemes.registry import get_scheme
from quant.scorer import KLComparison, Recorder, WatchedScorer
from quant.store import SweepResult, path_of, read
from quant.texts import SweepTexts

NUMERICS = 1
"""Goes up when a change of the code changes results, so that older ones are not taken for new."""


@dataclass(frozen=True)
class SweepTask:
    """A config of a checkpoint, with all that is needed to measure it in another process."""

    folder: Path  # the checkpoint
    digest: str  # a hash of it
    config: QuantConfig  # what to quantize, and how
    samples: Samples  # how much to measure
    texts: SweepTexts  # what to measure and calibrate on
    out: Path  # the folder of results
    harness: lm_eval_tasks.Harness | None = None  # lm-eval's tasks; None: none

    @property
    def checkpoint(self) -> str:
        return self.folder.resolve().name

    @property
    def name(self) -> str:
        """The name for people: `softpick weights-gptq-w3-g64`."""
        return f"{self.checkpoint} {self.config.name}"

    @property
    def key(self) -> dict[str, Any]:
        """What the result depends on."""
        harness = self.harness
        asked = {} if harness is None else {lm_eval_tasks.NAME: lm_eval_tasks.key(harness)}
        return {
            "checkpoint": self.digest,
            "config": self.config.key,
            "samples": dataclasses.asdict(self.samples),
            "texts": self.texts.key,
            "numerics": NUMERICS,
            **asked,
        }

    @property
    def path(self) -> Path:
        return path_of(self.out, self.checkpoint, self.config)

    @property
    def record(self) -> Path:
        """The folder of the unquantized model's log-probabilities."""
        common = {name: value for name, value in self.key.items() if name != "config"}
        text = json.dumps(common, sort_keys=True)
        name = f"{self.checkpoint}-{hashlib.sha256(text.encode()).hexdigest()[:16]}"
        return self.out / "records" / name


@functools.lru_cache(maxsize=1)
def checkpoint_of(folder: Path, length: int, digest: str) -> Checkpoint:
    """Return a checkpoint; the last one is kept, and its digest tells when it has changed."""
    return Checkpoint(folder, longest=length)


def measure(task: SweepTask) -> SweepResult:
    """Measure a config. The unquantized model's result is there before the others' are measured."""
    start = time.monotonic()
    torch.manual_seed(task.samples.seed)
    checkpoint = checkpoint_of(task.folder, task.samples.length, task.digest)
    unquantized = task.config == UNQUANTIZED
    if not unquantized and not task.record.exists():
        measure(dataclasses.replace(task, config=UNQUANTIZED))
    model, size = quantized_model(checkpoint, task)
    watcher = Recorder(task.record) if unquantized else KLComparison(task.record)
    summary, units = score(task, checkpoint, WatchedScorer(model, watcher))
    if isinstance(watcher, Recorder):
        watcher.finish()
        layers = linears(model)
        compared, inputs = input_outliers(model, layers, task.texts.calibration.rows)
        details = {"weight outliers": weight_outliers(layers), "input outliers": inputs}
    else:
        compared, details = watcher.finish()
        units["divergence"] = watcher.sequences()
        before = read(path_of(task.out, task.checkpoint, UNQUANTIZED))
        compared |= changes(units, before.units)
    return SweepResult(
        checkpoint=checkpoint.name,
        variant=checkpoint.variant,
        context=checkpoint.context,
        key=task.key,
        texts=task.texts.titles,
        machine=machine.summary(),
        seconds=round(time.monotonic() - start, 1),
        size=size,
        summary=summary | compared,
        details=details,
        units=units,
    )


def quantized_model(
    checkpoint: Checkpoint, task: SweepTask
) -> tuple[PreTrainedModel, dict[str, int]]:
    """Return the quantized model and its sizes in bytes."""
    config = task.config
    model = load(checkpoint.folder)
    texts = task.texts.calibration.rows
    stored = {}
    if config.scheme is not None:
        scheme = get_scheme(config.scheme)
        stored = quantize(model, scheme, config.spec, texts, config.lm_head, options=config.options)
    if config.activations is not None:
        layers = linears(model, config.lm_head)
        largest = largest_inputs(model, layers, texts) if config.static else None
        quantize_inputs(layers, config.activations, largest)
    if config.kv is not None:
        quantize_cache(model, config)
    item = (checkpoint.config.dtype or torch.float32).itemsize
    size = {
        "bytes": stored_bytes(model, stored, item),
        "quantized_bytes": sum(weight.packed_bytes for weight in stored.values()),
        "quantized_numbers": sum(weight.values.numel() for weight in stored.values()),
        "checkpoint_bytes": sum(f.stat().st_size for f in task.folder.glob("*.safetensors")),
        "cache_bytes_per_token": cache_bytes(model.config, config, item),
    }
    return model, size


def score(
    task: SweepTask, checkpoint: Checkpoint, scorer: WatchedScorer
) -> tuple[dict[str, Estimate], dict[str, Any]]:
    """Return the figures of the texts, the evaluation sets and lm-eval's tasks, and what was
    measured on each of their texts."""
    summary: dict[str, Estimate] = {}
    units: dict[str, Any] = {"perplexity": {}}
    for name, text in task.texts.measured.items():
        figures, units["perplexity"][name] = score_text(checkpoint, scorer, name, text)
        summary |= {f"perplexity: {figure}": value for figure, value in figures.items()}
    if task.texts.sets is not None:
        data = Data(evaluation=task.texts.sets)
        for one in (Blimp(task.samples.pairs), Lambada(task.samples.passages)):
            result = one.run(checkpoint, data, scorer)
            summary |= {f"{one.name}: {figure}": value for figure, value in result.summary.items()}
            units[one.name] = result.units
    if task.harness is not None:
        figures, units[lm_eval_tasks.NAME] = lm_eval_tasks.run(task.harness, checkpoint, scorer)
        summary |= figures
    return summary, units


def changes(units: dict[str, Any], baseline: dict[str, Any]) -> dict[str, Estimate]:
    """Return what quantization changed, text by text: losses in nats, shares."""
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
