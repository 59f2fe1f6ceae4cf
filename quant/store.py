"""Results as files: a JSON file for each config, `FOLDER/configs/CHECKPOINT/CONFIG.json`."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnserve.evaluation.intervals import Estimate
from attnserve.files import CHECKOUT
from quant.config import QuantConfig
from quant.texts import BOOK

OUT = Path("runs") / "quant"
"""Where the commands write and read results if no folder is named, in the current folder."""
FOLDER = CHECKOUT / "quant" / "results"
"""The project's own results, which docs/RESULTS.md shows."""
OLDER = {"measured": BOOK, "calibration": "training books"}
"""The texts of results that do not name theirs."""
FIELDS = ("checkpoint", "variant", "context", "key", "machine", "seconds", "size", "details")


@dataclass(frozen=True)
class Stored:
    """A config's result.

    Args:
        checkpoint, variant, context: what was measured; context in tokens.
        key: what the result is good for.
        texts: titles of the main text that was measured on, and of what was calibrated on.
        machine: and versions.
        seconds: that it took.
        size: bytes of the checkpoint, of its quantized part and of a cached token, and how many
            numbers are quantized.
        details: figures without intervals.
        summary: figures with theirs.
        units: what was measured on each text.
    """

    checkpoint: str
    variant: str
    context: int
    key: dict[str, Any]
    texts: dict[str, str]
    machine: str
    seconds: float
    size: dict[str, int]
    details: dict[str, Any]
    summary: dict[str, Estimate]
    units: dict[str, Any]

    @property
    def config(self) -> QuantConfig:
        """What was quantized."""
        return QuantConfig(**self.key["config"])

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits of a quantized number, scales and zero points included."""
        numbers = self.size["quantized_numbers"]
        return 8 * self.size["quantized_bytes"] / numbers if numbers else None


def path_of(folder: Path, checkpoint: str, config: QuantConfig) -> Path:
    """`folder/configs/softpick/weights-gptq-w3-g64.json`."""
    return folder / "configs" / checkpoint / f"{config.name}.json"


def write(folder: Path, result: dict[str, Any]) -> Path:
    """Write what `quant.measure.measure` gave; returns its path."""
    path = path_of(folder, result["checkpoint"], QuantConfig(**result["key"]["config"]))
    # One line a field diffs well and does not fill pages.
    lines = (f"{json.dumps(name)}: {json.dumps(value)}" for name, value in result.items())
    put(path, "{\n" + ",\n".join(lines) + "\n}\n")
    return path


def put(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(path.name + ".tmp")
    temporary.write_text(text, encoding="utf-8")
    os.replace(temporary, path)


def read(path: Path) -> Stored:
    """A result.

    Raises:
        ValueError: the file is none.
    """
    try:
        fields = json.loads(path.read_text(encoding="utf-8"))
        summary = {name: Estimate.from_json(ends) for name, ends in fields["summary"].items()}
        common = {name: fields[name] for name in FIELDS}
        texts = fields.get("texts", OLDER)
        found = Stored(**common, texts=texts, summary=summary, units=fields["units"])
        assert set(texts) == set(OLDER)
        assert found.config.name
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise ValueError(f"{path} is not a result of quant.sweep: {error!r}") from error
    return found


def read_all(folder: Path) -> list[Stored]:
    """All results, softmax first, the unquantized model before its cells.

    Raises:
        ValueError: a file is none, or there is no result.
    """
    found = [read(path) for path in sorted(folder.glob("configs/*/*.json"))]
    if not found:
        raise ValueError(f"{folder} holds no results: run python -m quant.sweep")
    return sorted(found, key=order)


def order(stored: Stored) -> tuple[Any, ...]:
    """Sorts results for tables."""
    config = stored.config
    first = (stored.variant != "softmax", stored.checkpoint, config != QuantConfig(), config.target)
    return (*first, config.scheme or "", config.bits or 0, config.group_size or 0, config.name)
