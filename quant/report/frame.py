"""Results as tables: one row a config."""

import dataclasses
from collections.abc import Sequence
from typing import Any

import pandas as pd

from attnserve.evaluation.intervals import Estimate
from quant.config import UNQUANTIZED, QuantConfig
from quant.schemes.registry import SCHEMES
from quant.store import SweepResult

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
    """Return everything about a config but the bits that the sweep varies."""
    parts = []
    if config.weights:
        parts.append(str(config.scheme))
        if not is_own_size(config):
            parts.append(f"groups of {config.group_size}" if config.group_size else "a row a group")
        if config.activations:
            parts.append(f"{config.activations}-bit activations")
    if config.kv and (config.weights or config.activations):
        parts.append(f"{config.kv}-bit cache")
    elif config.kv:
        parts.append(config.kv_format or "simulated, one scale a token")
    flags = {
        "symmetric": config.symmetric,
        "act-order": config.act_order,
        "searched ranges": config.search,
        "static": config.static,
        "with head": config.lm_head,
    }
    found = ", ".join([*parts, *(flag for flag, is_set in flags.items() if is_set)])
    return found or ("" if config == UNQUANTIZED else "one scale a token")


def is_own_size(config: QuantConfig) -> bool:
    """Return whether the group size is the scheme's own and goes with the bits."""
    scheme = SCHEMES.get(config.scheme or "")
    if scheme is None or not scheme.two_level or config.weights is None:
        return False
    return config.group_size == scheme.group_size(config.weights)


def frame(results: Sequence[SweepResult]) -> pd.DataFrame:
    """Return all configs, with value and ends of the 95 % interval of every figure."""
    rows = pd.DataFrame([_row(result) for result in results])
    return rows.astype(dict.fromkeys(INTEGERS, "Int64"))  # they may be missing


def _row(result: SweepResult) -> dict[str, Any]:
    """Return a config as flat values. What only a served model can tell is empty until it is
    measured."""
    config, served = result.config, result.details.get("served", {})
    values: dict[str, Any] = {
        "checkpoint": result.checkpoint,
        "variant": result.variant,
        "target": config.target,
        "bits": config.bits,
        "setting": setting(config),
        **{f"config {name}": value for name, value in dataclasses.asdict(config).items()},
        "bytes": result.size["bytes"],
        "bits per weight": result.bits_per_weight,
        "cache bytes per token": result.size["cache_bytes_per_token"],
        "resident bytes": served.get("resident_bytes"),
        "tokens per second": served.get("tokens_per_second"),
        "seconds": result.seconds,
        "machine": result.machine,
    }
    for name, estimate in result.summary.items():
        values |= {f"{name}{end}": x for end, x in zip(ENDS, estimate, strict=True)}
    for kind in ("KL", "p change"):
        for text, spread in result.details.get(f"{kind} over tokens", {}).items():
            values |= {f"{text} {kind}, {name}": value for name, value in spread.items()}
    return values


def text_of(results: Sequence[SweepResult]) -> str:
    """Return what was measured on: the title of the main text, or those of several checkpoints."""
    return "; ".join(dict.fromkeys(result.texts["measured"] for result in results))


def provenance(results: Sequence[SweepResult]) -> dict[str, list[str]]:
    """Return the samples and the machines of results."""
    return {
        "samples": sorted({str(result.key["samples"]) for result in results}),
        "machines": sorted({result.machine for result in results}),
    }


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
ESTIMATE = 27  # characters of an estimate with its interval, as a rule
WIDTHS = {"checkpoint": 18, "target": 19, "bits": 4, "how": 46, "MB": 7, "bits/weight": 11}
"""Characters of the other columns, as a rule: rows that are printed one by one are aligned."""


def shown(estimate: Estimate | None, digits: int | None = None, factor: float = 1.0) -> str:
    """Return an estimate for a table, with its interval; empty if there is none."""
    if estimate is None:
        return ""
    if digits is not None:
        return estimate.shown(digits, factor)
    value, low, high = (f"{factor * x:.2g}" for x in estimate)
    return f"{value} [{low}, {high}]"


def lines(results: Sequence[SweepResult], sets: bool) -> list[list[str]]:
    """Return the main figures as text: a heading, and a line a config; with those of the
    evaluation sets if asked for."""
    columns = {name: how for name, how in COLUMNS.items() if sets or name not in OF_SETS}
    rows = [[*HEAD, *(heading for heading, _, _ in columns.values())]]
    for result in results:
        config, per_weight = result.config, result.bits_per_weight
        row = [result.checkpoint, config.target, str(config.bits or ""), setting(config)]
        row.append(f"{result.size['bytes'] / 1e6:.2f}")
        row.append("" if per_weight is None else f"{per_weight:.2f}")
        for name, (_, digits, factor) in columns.items():
            row.append(shown(result.summary.get(name), digits, factor))
        rows.append(row)
    return rows


def table(results: Sequence[SweepResult], sets: bool = False) -> str:
    """Return the main figures for the terminal, with 95 % intervals."""
    rows = lines(results, sets)
    columns = zip(*rows, strict=True)
    widths = [max(*map(len, column), WIDTHS.get(column[0], ESTIMATE)) + 2 for column in columns]
    return "\n".join("".join(map(str.ljust, row, widths)).rstrip() for row in rows)
