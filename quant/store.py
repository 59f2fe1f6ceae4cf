"""Results as files: a JSON file for each config, `FOLDER/configs/CHECKPOINT/CONFIG.json`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from attnserve.errors import UserError
from attnserve.evaluation.intervals import Estimate
from attnserve.files import CHECKOUT, json_lines, write_text
from quant.config import UNQUANTIZED, QuantConfig

FOLDER = CHECKOUT / "quant" / "results"  # the project's own results, which docs/RESULTS.md shows
TITLES = {"measured": "test book", "calibration": "training books"}
"""The texts of results that do not name theirs."""


@dataclass(frozen=True)
class SweepResult:
    """What was measured with one config of a checkpoint."""

    # checkpoint, variant, context: what was measured; context in tokens.
    checkpoint: str
    variant: str
    context: int
    key: dict[str, Any]  # what the result depends on
    # Titles of the main text that was measured on, and of what was calibrated on.
    texts: dict[str, str]
    machine: str  # the machine and the versions
    seconds: float  # how long it took
    # Bytes of the checkpoint, of its quantized part and of a cached token, and how many
    # numbers are quantized.
    size: dict[str, int]
    summary: dict[str, Estimate]  # figures with their intervals
    details: dict[str, Any]  # figures without intervals
    units: dict[str, Any]  # what was measured on each text

    @property
    def config(self) -> QuantConfig:
        """What was quantized, and how."""
        return QuantConfig(**self.key["config"])

    @property
    def bits_per_weight(self) -> float | None:
        """Stored bits of a quantized number, scales and zero points included."""
        numbers = self.size["quantized_numbers"]
        return 8 * self.size["quantized_bytes"] / numbers if numbers else None

    @property
    def order(self) -> tuple[Any, ...]:
        """What sorts results in tables: softmax first, the unquantized model before its configs."""
        config = self.config
        first = (self.variant != "softmax", self.checkpoint, config != UNQUANTIZED, config.target)
        return (
            *first, config.scheme or "", config.bits or 0, config.group_size or 0, config.name
        )  # fmt: skip


def path_of(folder: Path, checkpoint: str, config: QuantConfig) -> Path:
    """Return `folder/configs/softpick/weights-gptq-w3-g64.json`."""
    return folder / "configs" / checkpoint / f"{config.name}.json"


def write(path: Path, result: SweepResult) -> None:
    """Write a result, whole or not at all."""
    summary = {name: estimate.json() for name, estimate in result.summary.items()}
    write_text(path, json_lines(vars(result) | {"summary": summary}) + "\n")


def read(path: Path) -> SweepResult:
    """Read a result."""
    try:
        fields = {"texts": TITLES} | json.loads(path.read_text(encoding="utf-8"))
        fields["summary"] = {k: Estimate.from_json(v) for k, v in fields["summary"].items()}
        found = SweepResult(**fields)
        assert set(found.texts) == set(TITLES) and found.config.name
    except (ValueError, KeyError, TypeError, AttributeError, AssertionError) as error:
        raise UserError(f"{path} is not a result of quant.sweep: {error!r}") from error
    return found


def read_all(folder: Path) -> list[SweepResult]:
    """Read all results, in the order of tables."""
    found = [read(path) for path in folder.glob("configs/*/*.json")]
    if not found:
        raise UserError(f"{folder} holds no results: run python -m quant.sweep")
    return sorted(found, key=lambda result: result.order)
