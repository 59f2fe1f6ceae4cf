"""The measures of one checkpoint, each written as soon as it is there."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterable, Sequence
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attnserve import machine
from attnserve.errors import UserError
from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.measures import Data, Measure
from attnserve.evaluation.perplexity import Perplexity
from attnserve.evaluation.scorers import Scorer, TransformersScorer
from attnserve.evaluation.tasks import Blimp, Lambada
from training.analyze.attention import Attention
from training.analyze.length import Length, multiples
from training.analyze.passkey import Passkey
from training.analyze.settings import MULTIPLE, QUICK_LIMIT, QUICK_MULTIPLE, AnalysisSettings
from training.analyze.store import Stored, key_of, path_of, read, write

MEASURES: dict[str, type[Measure]] = {
    cls.name: cls for cls in (Attention, Length, Passkey, Lambada, Blimp, Perplexity)
}


def measures(settings: AnalysisSettings, names: Iterable[str], context: int) -> list[Measure]:
    """Return the chosen measures with their settings, for a model of some training length."""
    limit = QUICK_LIMIT if settings.quick and settings.limit is None else settings.limit
    if context > settings.max_length:
        raise UserError(
            f"the training length of {context} tokens is above --max-length {settings.max_length}: "
            "raise it, or lower --context"
        )
    longest = multiples(settings.max_length // context)[-1]
    multiple = min(QUICK_MULTIPLE if settings.quick else MULTIPLE, longest)
    chosen: list[Measure] = []
    for name in names:
        measure = MEASURES[name]()
        if measure.uses_length:
            fields: dict[str, Any] = {"multiple": multiple}
            measure = dataclasses.replace(measure, **fields)
        elif settings.rope_theta_factor != 1.0:
            continue
        if settings.engine == "transformers" or measure.needs_scores:
            chosen.append(measure.limited(limit))
    return chosen


def stored(
    checkpoint: Checkpoint, measure: Measure, data: Data, settings: AnalysisSettings
) -> Stored | None:
    """Return what is there already of a measure; None: it is to be measured."""
    parts = (checkpoint.name, measure.name, settings.engine, settings.rope_theta_factor)
    path = path_of(settings.out, *parts)
    if settings.force or not path.exists():
        return None
    found, key = read(path), key_of(checkpoint, measure, data)
    if found.key != key:
        differing = ", ".join(name for name in key if key[name] != found.key.get(name))
        raise UserError(
            f"{path} holds a result with another {differing}: --force measures again and "
            "replaces it, --out DIR writes elsewhere"
        )
    return found


def scorer_for(
    checkpoint: Checkpoint, missing: Sequence[Measure], settings: AnalysisSettings
) -> Scorer:
    """Return the model in the chosen engine."""
    if settings.engine == "transformers":
        return TransformersScorer(
            checkpoint.folder, settings.rope_theta_factor, device=settings.device
        )
    from attnserve.evaluation.vllm_scorer import VLLMScorer

    return VLLMScorer(
        checkpoint.folder,
        max(measure.longest(checkpoint) for measure in missing),
        rope_theta_factor=settings.rope_theta_factor,
        kv_cache_memory_bytes=2**30,
    )


def analyze(
    folder: Path, names: Iterable[str], data: Data, settings: AnalysisSettings
) -> list[Stored]:
    """Return all chosen measures of one checkpoint."""
    checkpoint = Checkpoint(folder, settings.context)
    chosen = measures(settings, names, checkpoint.context)
    for measure in chosen:
        files = measure.files(data)
        for file in files:
            if not file.exists():
                raise UserError(f"{file} is not there: name its folder with --eval or --books")
        if isinstance(measure, Blimp) and not files:
            raise UserError(f"{data.sets} has no blimp/*.jsonl: name its folder with --eval")
    present = [stored(checkpoint, measure, data, settings) for measure in chosen]
    missing = [m for m, found in zip(chosen, present, strict=True) if found is None]
    results = [found for found in present if found is not None]
    counts = f"{len(missing)} to measure, {len(results)} there already"
    print(f"{checkpoint.name}: {counts}", file=sys.stderr, flush=True)
    if not missing:
        return results
    engine_version = f", vllm {version('vllm')}" if settings.engine == "vllm" else ""
    with closing(scorer_for(checkpoint, missing, settings)) as scorer:
        for measure in missing:
            start = time.monotonic()
            result = measure.run(checkpoint, data, scorer)
            found = Stored(
                checkpoint=checkpoint.name,
                variant=checkpoint.variant,
                context=checkpoint.context,
                measure=measure.name,
                engine=settings.engine,
                rope_theta_factor=settings.rope_theta_factor,
                key=key_of(checkpoint, measure, data),
                machine=machine.summary() + engine_version,
                seconds=round(time.monotonic() - start, 1),
                result=result,
            )
            write(settings.out, found)
            results.append(found)
    return sorted(results, key=lambda found: list(MEASURES).index(found.measure))
