"""Results as files: one JSON a checkpoint and measure, each with what it was measured on."""

from __future__ import annotations

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnserve.evaluation.checkpoint import Checkpoint, digest
from attnserve.evaluation.intervals import Estimate
from attnserve.evaluation.measures import Data, Measure, Result
from attnserve.files import json_lines, json_parts, write_text


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
    """All that the result depends on: the checkpoint's hash, settings, hashes of the texts."""
    machine: str
    seconds: float
    result: Result


def path_of(folder: Path, checkpoint: str, measure: str, engine: str, factor: float) -> Path:
    """Return `folder/softpick/length.json`, or `length.theta50.vllm.json`."""
    theta = "" if factor == 1.0 else f".theta{factor:g}"
    other = "" if engine == "transformers" else f".{engine}"
    return folder / checkpoint / f"{measure}{theta}{other}.json"


def key_of(checkpoint: Checkpoint, measure: Measure, data: Data) -> dict[str, Any]:
    """Return what a result depends on, but for engine and RoPE, which its file's name has."""
    return {
        "checkpoint": checkpoint.digest,
        "context": checkpoint.context,
        "settings": dataclasses.asdict(measure),
        "texts": {file.name: digest(file) for file in measure.files(data)},
    }


def read(path: Path) -> Stored:
    """Return a result."""
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        summary = {
            name: Estimate.from_json(values) for name, values in fields.pop("summary").items()
        }
        return Stored(**fields.pop("about"), result=Result(summary, fields.pop("units")))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is not a result of training.analyze: {error!r}") from error


def write(folder: Path, stored: Stored) -> Path:
    """Write a result and return its path."""
    about = {name: value for name, value in vars(stored).items() if name != "result"}
    place = (stored.checkpoint, stored.measure, stored.engine, stored.rope_theta_factor)
    path = path_of(folder, *place)
    parts = {
        "about": json.dumps(about, indent=1),
        "summary": json_lines({name: e.json() for name, e in stored.result.summary.items()}),
        "units": json_lines(stored.result.units),
    }
    write_text(path, json_parts(parts))
    return path
