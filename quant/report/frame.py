"""Results as a table: one row a cell."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import pandas as pd

from quant.cell import Cell
from quant.store import Stored
from training.analyze.intervals import Estimate

ENDS = ("", " low", " high")
INTEGERS = ("bits", "cell weights", "cell activations", "cell kv", "cell group", "resident bytes")


def setting(cell: Cell) -> str:
    """Everything about a cell but the width that the sweep varies."""
    parts = []
    if cell.weights:
        parts += [str(cell.scheme), f"groups of {cell.group}" if cell.group else "a row a group"]
        if cell.activations:
            parts.append(f"{cell.activations}-bit activations")
    if cell.kv and cell.kv != cell.bits:
        parts.append(f"{cell.kv}-bit cache")
    flags = {
        "symmetric": cell.symmetric,
        "act-order": cell.act_order,
        "static": cell.static,
        "with head": cell.lm_head,
    }
    found = ", ".join([*parts, *(flag for flag, is_set in flags.items() if is_set)])
    return found or ("" if cell == Cell() else "one scale a token")


def row(stored: Stored) -> dict[str, Any]:
    """A cell as flat values. What only a served model can tell is empty until it is measured."""
    cell, served = stored.cell, stored.details.get("served", {})
    values: dict[str, Any] = {
        "checkpoint": stored.checkpoint,
        "variant": stored.variant,
        "what": cell.what,
        "bits": cell.bits,
        "setting": setting(cell),
        **{f"cell {name}": value for name, value in dataclasses.asdict(cell).items()},
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
KL are the test book's."""
HEAD = ("checkpoint", "what", "bits", "how", "MB", "bits/weight")


def shown(estimate: Estimate | None, digits: int | None = None, factor: float = 1.0) -> str:
    """An estimate in a table, with its interval; empty if there is none."""
    if estimate is None:
        return ""
    if digits is not None:
        return estimate.shown(digits, factor)
    value, low, high = (f"{factor * x:.2g}" for x in estimate)
    return f"{value} [{low}, {high}]"


def lines(results: Sequence[Stored]) -> list[list[str]]:
    """The main figures as text: a heading, and a line a cell."""
    found = [[*HEAD, *(heading for heading, _, _ in COLUMNS.values())]]
    for stored in results:
        cell, per_weight = stored.cell, stored.bits_per_weight
        cells = [stored.checkpoint, cell.what, str(cell.bits or ""), setting(cell)]
        cells.append(f"{stored.size['bytes'] / 1e6:.2f}")
        cells.append("" if per_weight is None else f"{per_weight:.2f}")
        for name, (_, digits, factor) in COLUMNS.items():
            cells.append(shown(stored.summary.get(name), digits, factor))
        found.append(cells)
    return found


def table(results: Sequence[Stored]) -> str:
    """The main figures for the terminal, with 95 % intervals."""
    rows = lines(results)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
