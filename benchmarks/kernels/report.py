"""What a run leaves: the table, the plot, the appended CSV and the JSON line."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import pandas as pd
from matplotlib.figure import Figure

from benchmarks.kernels.measure import Row, Timing


def _milliseconds(prefix: str, timing: Timing) -> dict[str, float | None]:
    """Columns `<prefix>ms_p20`, `<prefix>ms_median` and `<prefix>ms_p80`."""
    spread = timing.spread
    return {
        f"{prefix}ms_{name}": None if spread is None else getattr(spread, name)
        for name in ("p20", "median", "p80")
    }


def record(row: Row) -> dict[str, object]:
    """All of a row, flat: the CSV's columns after those of the run."""
    case = row.case
    return {
        "variant": row.variant,
        "phase": case.phase,
        "dtype": case.dtype,
        "head_dim": case.head_dim,
        "ctx": case.ctx,
        "batch": case.batch,
        "new_tokens": case.new_tokens,
        "num_heads": case.num_heads,
        "num_kv_heads": case.num_kv_heads,
        "block_size": case.block_size,
        "peer_isa": row.peer_isa,
        "rounds": len(row.ours.seconds),
        **_milliseconds("", row.ours),
        **_milliseconds("vllm_", row.vllm),
        **_milliseconds("sdpa_", row.sdpa),
        "ratio_vllm": row.ratio_vllm,
        "ratio_sdpa": row.ratio_sdpa,
        "rate": row.rate,
        "rate_unit": row.unit,
        "limit": row.limit,
        "fraction_of_limit": row.fraction_of_limit,
        "error": row.ours.error,
        "note": row.note,
    }


def table(rows: Sequence[Row]) -> str:
    """One line a row, aligned."""

    def number(value: float | None, digits: int) -> str:
        return "-" if value is None else f"{value:.{digits}f}"

    lines = []
    for row in rows:
        case, spread = row.case, row.ours.spread
        lines.append(
            {
                "variant": row.variant,
                "phase": case.phase,
                "dtype": case.dtype,
                "D": case.head_dim,
                "ctx": case.ctx,
                "batch": case.batch,
                "new": case.new_tokens,
                "ms": "-" if spread is None else f"{spread.median:.3f}",
                "p20-p80": "-" if spread is None else f"{spread.p20:.3f}-{spread.p80:.3f}",
                "/vLLM": number(row.ratio_vllm, 2),
                "/SDPA": number(row.ratio_sdpa, 2),
                "rate": "-" if row.rate is None else f"{row.rate:.1f} {row.unit}",
                "of limit": number(row.fraction_of_limit, 2),
                "rounds": len(row.ours.seconds),
                "error": f"{row.ours.error:.1e}",
                "note": row.note,
            }
        )
    return pd.DataFrame(lines).to_string(index=False)


def json_row(row: Row) -> dict[str, object]:
    """A row of the last line."""
    case = row.case
    shown: dict[str, object] = {
        "variant": row.variant,
        "phase": case.phase,
        "dtype": case.dtype,
        "head_dim": case.head_dim,
        "ctx": case.ctx,
        "batch": case.batch,
    }
    if case.phase == "prefill":
        shown["new_tokens"] = case.new_tokens
    for name in ("ratio_vllm", "ratio_sdpa", "fraction_of_limit"):
        value = getattr(row, name)
        shown[name] = None if value is None else round(value, 4)
    if row.note:
        shown["note"] = row.note
    return shown


def check_csv(path: Path) -> None:
    """Find out now, not after the run, that rows cannot be added to `path`.

    Raises:
        OSError, ValueError: it is no file that can be written, or no CSV.
    """
    if path.exists():
        _read(path)
        path.open("a").close()
    if not os.access(path.parent, os.W_OK):
        raise PermissionError(f"no permission to write in {path.parent}")


def _read(path: Path) -> pd.DataFrame:
    """All cells as text: numbers and empty cells of old rows must not change."""
    return pd.read_csv(path, dtype=str, keep_default_na=False)


def append_csv(path: Path, run: Mapping[str, object], rows: Sequence[Row]) -> None:
    """Add rows to a CSV file. What is in it stays as it is; columns it does not have come last.

    Args:
        path: the file; made if missing (its folder is not).
        run: columns that all rows share, first in a new file.
        rows: the rows.
    """
    added = pd.DataFrame([{**run, **record(row)} for row in rows])
    if path.exists():
        added = pd.concat([_read(path), added])
    partial = path.with_name(path.name + ".partial")
    added.to_csv(partial, index=False, float_format="%.6g")
    os.replace(partial, path)


def plot(path: Path, title: str, rows: Sequence[Row]) -> None:
    """A PNG: each variant's time by vLLM's softmax kernel, a panel for each phase and dtype.

    Args:
        path: the file.
        title: of the figure.
        rows: of the run.
    """
    panels = list(dict.fromkeys((row.case.phase, row.case.dtype) for row in rows))
    variants = list(dict.fromkeys(row.variant for row in rows))
    figure = Figure(figsize=(7 * min(2, len(panels)), 4.2 * -(-len(panels) // 2)))
    figure.suptitle(title, fontsize=9)
    for index, (phase, dtype) in enumerate(panels):
        axes = figure.add_subplot(-(-len(panels) // 2), min(2, len(panels)), index + 1)
        inside = [r for r in rows if (r.case.phase, r.case.dtype) == (phase, dtype)]
        labels = list(dict.fromkeys(row.case.label for row in inside))
        for variant, marker in zip(variants, "osD^vP*X" * len(variants), strict=False):
            found = [r for r in inside if r.variant == variant and r.ratio_vllm is not None]
            axes.plot(
                [labels.index(row.case.label) for row in found],
                [row.ratio_vllm or 0.0 for row in found],
                marker=marker,
                linestyle=":",
                label=variant,
            )
        axes.axhline(1.0, color="black", linewidth=0.8)
        axes.set_ylim(bottom=0)
        axes.set_title(f"{phase} {dtype}")
        axes.set_ylabel("time / vLLM's softmax")
        axes.set_xticks(range(len(labels)), labels, rotation=60, ha="right", fontsize=7)
        if index == 0:
            axes.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
