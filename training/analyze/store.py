"""Results as files: one JSON a checkpoint and measure, each with what it was measured on."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

from attnserve import machine
from attnserve.evaluation.checkpoint import Checkpoint, digest
from attnserve.evaluation.intervals import Estimate
from attnserve.evaluation.measures import Data, Measure, Result
from attnserve.files import CHECKOUT, json_lines, write_text

FOLDER = CHECKOUT / "training" / "results" / "analysis"


@dataclass(frozen=True)
class Stored:
    """A result's file, read."""

    checkpoint: str
    variant: str
    context: int
    measure: str
    engine: str
    rope_theta_factor: float
    key: dict[str, Any]
    """What the result is good for: checkpoint's hash, settings, hashes of the texts."""
    machine: str
    seconds: float
    result: Result


def path_of(folder: Path, checkpoint: str, measure: str, engine: str, factor: float) -> Path:
    """`folder/softpick/length.json`, or `length.theta50.vllm.json`."""
    theta = "" if factor == 1.0 else f".theta{factor:g}"
    other = "" if engine == "transformers" else f".{engine}"
    return folder / checkpoint / f"{measure}{theta}{other}.json"


def key_of(checkpoint: Checkpoint, measure: Measure, data: Data) -> dict[str, Any]:
    """What a result depends on, but for engine and RoPE, which are in its file's name."""
    return {
        "checkpoint": checkpoint.digest,
        "context": checkpoint.context,
        "settings": dataclasses.asdict(measure),
        "texts": {file.name: digest(file) for file in measure.files(data)},
    }


def read(path: Path) -> Stored:
    """A result.

    Raises:
        ValueError: the file is none.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        summary = {
            name: Estimate.from_json(values) for name, values in fields.pop("summary").items()
        }
        return Stored(**fields.pop("about"), result=Result(summary, fields.pop("units")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a result of training.analyze: {error!r}") from error


def write(folder: Path, stored: Stored) -> Path:
    """Write a result, whole or not at all; returns its path."""
    about = {
        field.name: getattr(stored, field.name)
        for field in dataclasses.fields(stored)
        if field.name != "result"
    }
    path = path_of(
        folder, stored.checkpoint, stored.measure, stored.engine, stored.rope_theta_factor
    )
    parts = {
        "about": json.dumps(about, indent=1),
        "summary": json_lines({name: e.json() for name, e in stored.result.summary.items()}),
        "units": json_lines(stored.result.units),
    }
    text = "{\n" + ",\n".join(f'"{name}": {part}' for name, part in parts.items()) + "\n}\n"
    write_text(path, text)
    return path


def stored(
    checkpoint: Checkpoint,
    measure: Measure,
    data: Data,
    engine: str,
    factor: float,
    seconds: float,
    result: Result,
) -> Stored:
    """A new result with everything that it should carry."""
    engine_version = f", vllm {version('vllm')}" if engine == "vllm" else ""
    return Stored(
        checkpoint=checkpoint.name,
        variant=checkpoint.variant,
        context=checkpoint.context,
        measure=measure.name,
        engine=engine,
        rope_theta_factor=factor,
        key=key_of(checkpoint, measure, data),
        machine=machine.summary() + engine_version,
        seconds=round(seconds, 1),
        result=result,
    )
