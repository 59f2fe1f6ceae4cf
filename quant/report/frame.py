"""Results as a table: one row a config."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pandas as pd

from attnserve.evaluation.intervals import Estimate
from quant.config import QuantConfig
from quant.store import Stored

ENDS = ("", " low", " high")
INTEGERS = (
    "bits",
    "config weights",
    "config activations",
    "config kv",
    "config group_size",
    "resident bytes",
)


def setting(config: QuantConfig) -> str:
    """Everything about a config but the width that the sweep varies."""
    parts = []
    if config.weights:
        parts += [
            str(config.scheme),
            f"groups of {config.group_size}" if config.group_size else "a row a group",
        ]
        if config.activations:
            parts.append(f"{config.activations}-bit activations")
    if config.kv and config.kv != config.bits:
        parts.append(f"{config.kv}-bit cache")
    flags = {
        "symmetric": config.symmetric,
        "act-order": config.act_order,
        "static": config.static,
        "with head": config.lm_head,
    }
    found = ", ".join([*parts, *(flag for flag, is_set in flags.items() if is_set)])
    return found or ("" if config == QuantConfig() else "one scale a token")


def row(stored: Stored) -> dict[str, Any]:
    """A config as flat values. What only a served model can tell is empty until it is measured."""
    config, served = stored.config, stored.details.get("served", {})
    values: dict[str, Any] = {
        "checkpoint": stored.checkpoint,
        "variant": stored.variant,
        "target": config.target,
        "bits": config.bits,
        "setting": setting(config),
        **{f"config {name}": value for name, value in dataclasses.asdict(config).items()},
        "bytes": stored.size["bytes"],
        "bits per weight": stored.bits_per_weight,
        "cache bytes per token": stored.size["cache_bytes_per_token"],
        "resident bytes": served.get("resident_bytes"),
        "tokens per second": served.get("tokens_per_second"),
        "seconds": stored.seconds,
        "machine": stored.machine,
    }
    for name, estimate in stored.summary.items():
        values |= {f"{name}{end}": x for end, x in zip(ENDS, estimate, strict=True)}
    for kind in ("KL", "p change"):
        for text, spread in stored.details.get(f"{kind} over tokens", {}).items():
            values |= {f"{text} {kind}, {name}": value for name, value in spread.items()}
    return values


def frame(results: Sequence[Stored]) -> pd.DataFrame:
    """All cells, with value and ends of the 95 % interval of every figure."""
    rows = pd.DataFrame([row(stored) for stored in results])
    return rows.astype(dict.fromkeys(INTEGERS, "Int64"))  # they may be missing


def text_of(results: Sequence[Stored]) -> str:
    """What was measured on: the title of the main text, or those of several checkpoints."""
    return "; ".join(dict.fromkeys(stored.texts["measured"] for stored in results))


COLUMNS: dict[str, tuple[str, int | None, float]] = {
    "perplexity: test per token": ("perplexity", 2, 1.0),
    "test loss change": ("loss change", None, 1.0),
    "test KL": ("KL", None, 1.0),
    "test top-1": ("same top-1, %", 1, 100.0),
    "wikitext2 KL": ("KL, wikitext2", None, 1.0),
    "blimp change": ("BLiMP change, %", 1, 100.0),
    "lambada loss change": ("LAMBADA loss change", 3, 1.0),
}
"""Of the main table: heading, decimals (None: two significant digits), factor. Perplexity, loss and
KL are the main text's."""
OF_SETS = ("wikitext2 KL", "blimp change", "lambada loss change")
"""Columns that are there only where the evaluation sets were measured."""
HEAD = ("checkpoint", "target", "bits", "how", "MB", "bits/weight")
WIDTH = 24
"""Characters of an estimate with its interval, as a rule."""


def shown(estimate: Estimate | None, digits: int | None = None, factor: float = 1.0) -> str:
    """An estimate in a table, with its interval; empty if there is none."""
    if estimate is None:
        return ""
    if digits is not None:
        return estimate.shown(digits, factor)
    value, low, high = (f"{factor * x:.2g}" for x in estimate)
    return f"{value} [{low}, {high}]"


def line(stored: Stored, columns: Sequence[str]) -> list[str]:
    """A config's main figures as text, those of some of `COLUMNS`."""
    config, per_weight = stored.config, stored.bits_per_weight
    cells = [stored.checkpoint, config.target, str(config.bits or ""), setting(config)]
    cells.append(f"{stored.size['bytes'] / 1e6:.2f}")
    cells.append("" if per_weight is None else f"{per_weight:.2f}")
    for name in columns:
        _, digits, factor = COLUMNS[name]
        cells.append(shown(stored.summary.get(name), digits, factor))
    return cells


def lines(results: Sequence[Stored]) -> list[list[str]]:
    """The main figures as text: a heading, and a line a config; figures that no config has are left
    out."""
    measured = {name for stored in results for name in stored.summary}
    columns = [name for name in COLUMNS if name in measured]
    head = [*HEAD, *(COLUMNS[name][0] for name in columns)]
    return [head, *(line(stored, columns) for stored in results)]


def table(results: Sequence[Stored]) -> str:
    """The main figures for the terminal, with 95 % intervals."""
    rows = lines(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(joined(row, widths) for row in rows)


def joined(row: Sequence[str], widths: Sequence[int]) -> str:
    """A row of a table in columns."""
    pairs = zip(row, widths, strict=True)
    return "  ".join(config.ljust(width) for config, width in pairs).rstrip()


class Rows:
    """The main table a row at a time, in columns that are wide enough for what is to come.

    Args:
        checkpoints: their names.
        cells: all that will be shown.
        sets: the evaluation sets are measured.
    """

    def __init__(
        self, checkpoints: Sequence[str], cells: Sequence[QuantConfig], sets: bool
    ) -> None:
        self.columns = [name for name in COLUMNS if sets or name not in OF_SETS]
        fixed = [
            checkpoints,
            [config.target for config in cells],
            [],
            [setting(config) for config in cells],
        ]
        texts = [*fixed, ["0000.00"], []]
        head = [*HEAD, *(COLUMNS[name][0] for name in self.columns)]
        self.widths = [max(map(len, [title, *own])) for title, own in zip(HEAD, texts, strict=True)]
        self.widths += [max(WIDTH, len(title)) for title in head[len(HEAD) :]]
        self.head = joined(head, self.widths)

    def row(self, stored: Stored) -> str:
        """Return a config's line."""
        return joined(line(stored, self.columns), self.widths)
