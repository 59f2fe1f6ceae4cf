"""Everything that was measured, read from files, and comparisons of two checkpoints in pairs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from numpy.typing import NDArray

from attnserve.budgets.result import Found
from attnserve.evaluation.intervals import Estimate, mean_interval
from quant import store
from quant.store import SweepResult
from training.analyze.length import BINS
from training.analyze.store import Stored, read

Values = NDArray[np.float64]
LAST_STEPS = 100


class Missing(Exception):
    """A claim cannot be judged: the message says what is not there."""


@dataclass(frozen=True)
class Evidence:
    """All results.

    Args:
        results: by checkpoint, measure, RoPE factor and engine.
        curves: training losses, one frame `step, learning_rate, loss` a checkpoint.
        rates: the table of `training.learning_rate`, or None.
        pruning: results of `attnserve budgets` by checkpoint.
        long_context: the table of `training.long_context`, or None.
        quantization: results of `quant.sweep`.
        control: the softmax checkpoint that the others are compared with.
    """

    results: dict[tuple[str, str, float, str], Stored]
    curves: dict[str, pd.DataFrame]
    rates: pd.DataFrame | None
    pruning: dict[str, Found]
    long_context: pd.DataFrame | None
    quantization: Sequence[SweepResult] = ()
    control: str = "softmax"

    @property
    def names(self) -> list[str]:
        """Return checkpoints with any result or curve: the control first, the others by name."""
        found = {key[0] for key in self.results} | set(self.curves)
        return sorted(found, key=lambda name: (name != self.control, name))

    def of(self, measure: str, factor: float = 1.0) -> dict[str, Stored]:
        """Return a measure's results by checkpoint, of transformers where there are several."""
        found = {}
        for name in self.names:
            for engine in ("vllm", "transformers"):
                if (name, measure, factor, engine) in self.results:
                    found[name] = self.results[name, measure, factor, engine]
        return found

    def factors(self, measure: str) -> list[float]:
        """Return the factors of RoPE's theta that a measure has results of."""
        return sorted({key[2] for key in self.results if key[1] == measure})

    def get(self, name: str, measure: str, factor: float = 1.0) -> Stored:
        """Return a result."""
        found = self.of(measure, factor)
        if name not in found:
            theta = "" if factor == 1.0 else f" with theta x{factor:g}"
            raise Missing(f"no result {measure}{theta} of {name}")
        return found[name]

    def pair(
        self, name: str, other: str, measure: str, factor: float = 1.0
    ) -> tuple[Stored, Stored]:
        """Return results of two checkpoints that were measured alike on the same texts."""
        a, b = self.get(name, measure, factor), self.get(other, measure, factor)
        for part in ("context", "settings", "texts"):
            if a.key[part] != b.key[part]:
                raise Missing(f"{measure} of {name} and {other} differ in their {part}")
        return a, b

    def estimate(self, name: str, measure: str, figure: str, factor: float = 1.0) -> Estimate:
        """Return a figure of a result's summary."""
        found = self.get(name, measure, factor).result.summary
        if figure not in found:
            raise Missing(f"{measure} of {name} has no figure {figure}")
        return found[figure]


def load(results: Path, checkpoints: Path, quantization: Path) -> Evidence:
    """Read everything: a folder like training/results, whatever of it is there, the `loss.csv` of
    checkpoints, and what `quant.sweep` wrote."""

    def table(csv: Path, **settings: Any) -> pd.DataFrame | None:
        return pd.read_csv(csv, **settings) if csv.exists() else None

    stored = [read(path) for path in sorted((results / "analysis").glob("*/*.json"))]
    curves = {path.parent.name: pd.read_csv(path) for path in checkpoints.glob("*/loss.csv")}
    return Evidence(
        {(s.checkpoint, s.measure, s.rope_theta_factor, s.engine): s for s in stored},
        {name: curves[name] for name in sorted(curves)},
        table(results / "learning_rate.csv"),
        {path.stem: Found.read(path) for path in sorted((results / "budgets").glob("*.json"))},
        table(results / "long_context.csv", keep_default_na=False),
        swept(quantization),
    )


def swept(folder: Path) -> list[SweepResult]:
    """Return the results of a sweep; none if there are none."""
    return store.read_all(folder) if any(folder.glob("configs/*/*.json")) else []


def difference(a: Sequence[float] | Values, b: Sequence[float] | Values) -> Estimate:
    """Return the mean of `a - b`, value by value on the same texts."""
    return mean_interval(np.asarray(a, np.float64) - np.asarray(b, np.float64))


def windows(stored: Stored, multiple: int) -> Values:
    """Return the mean loss of each window's first `multiple` training lengths, `[windows]`."""
    bins = np.asarray(stored.result.units["windows"], np.float64)
    if bins.shape[1] < multiple * BINS:
        raise Missing(f"length of {stored.checkpoint} ends before {multiple}x")
    return bins[:, : multiple * BINS].mean(1)


def pieces(stored: Stored, multiple: int) -> Values:
    """Return the mean loss of the same tokens as `windows`, in pieces of the training length."""
    windows(stored, multiple)
    return np.asarray(stored.result.units["pieces"], np.float64)[:, : multiple * BINS].mean(1)


def gains(stored: Stored, multiple: int) -> Values:
    """Return the passkey gain of each pair at `multiple` training lengths."""
    if str(multiple) not in stored.result.units:
        raise Missing(f"passkey of {stored.checkpoint} ends before {multiple}x")
    return np.asarray(stored.result.units[str(multiple)]["gain"], np.float64)


def last_losses(evidence: Evidence, name: str, steps: int = LAST_STEPS) -> tuple[int, Values]:
    """Return the number of training steps, and the losses of the last of them."""
    if name not in evidence.curves:
        raise Missing(f"no loss.csv of {name}")
    losses = evidence.curves[name]["loss"].to_numpy(np.float64)
    return len(losses), losses[-steps:]
