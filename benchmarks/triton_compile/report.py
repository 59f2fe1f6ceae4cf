"""The table, the list of what exceeds a limit, and the summary."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Any

import pandas as pd

LONG = 120
"""Rows from which on the table has a line for all GPUs together."""

RED, PLAIN = "\033[31m", "\033[0m"

NAMES = ("arch", "head_dim", "dtype", "variant", "phase", "kernel")

Row = dict[str, Any]


def tile(row: Row, prefix: str = "") -> str:
    """Rows x keys of a tile, warps and stages."""
    rows, keys, warps, stages = (
        row[prefix + name] for name in ("rows", "keys", "num_warps", "num_stages")
    )
    return "-" if rows is None else f"{rows}x{keys} w{warps} s{stages}"


def figures(row: Row, prefix: str = "") -> str:
    """Registers, shared memory and the loop, in one cell; "-" where there are none."""
    if row[prefix + "registers"] is None:
        return "-"
    spills = f"+{row[prefix + 'spills']}B" if row[prefix + "spills"] else ""
    loop = "/".join(str(row[f"{prefix}loop{name}"]) for name in ("", "_matrix", "_fma", "_special"))
    return f"{row[prefix + 'registers']}{spills} {row[prefix + 'shared'] / 1024:.1f}K {loop}"


def ratio(row: Row) -> str:
    """Registers by vLLM's."""
    value = row["registers_to_vllm"]
    return "" if value is None else f"{value:.2f}"


def mark(row: Row) -> str:
    """Of a row that something is wrong with."""
    return "FAILED" if row["error"] else "!" if row["violation"] else ""


def table(rows: Sequence[Row]) -> str:
    """A line a kernel, with vLLM's figures; if there are many, a line for all GPUs together."""
    head = (
        "registers[+spilled bytes], shared memory in KiB, loop: instructions/mma/fma/special; "
        "!: exceeds a limit"
    )
    if len(rows) <= LONG:
        lines = [
            {name: row[name] for name in NAMES}
            | {
                "tile": tile(row),
                "ours": figures(row),
                "vLLM, same tile": figures(row, "vllm_"),
                "registers": ratio(row),
                "vLLM's tile": tile(row, "vllm_own_"),
                "vLLM": figures(row, "vllm_own_"),
                "": mark(row),
            }
            for row in rows
        ]
        return f"{pd.DataFrame(lines).to_string(index=False)}\n{head}"
    wide: dict[tuple[Any, ...], Row] = {}
    for row in rows:
        line = wide.setdefault(tuple(row[name] for name in NAMES[1:]), {})
        line |= {name: row[name] for name in NAMES[1:]}
        near = f" ({ratio(row)})" if ratio(row) else ""
        line[row["arch"]] = mark(row) if row["error"] else f"{figures(row)}{near}{mark(row)}"
    text = pd.DataFrame(list(wide.values())).fillna("-").to_string(index=False)
    return f"{text}\n{head}; in brackets: registers by vLLM's at the same tile"


def complaints(rows: Sequence[Row], *, colour: bool) -> str:
    """A line for each kernel that exceeds a limit or does not compile."""
    start, end = (RED, PLAIN) if colour else ("", "")
    lines = [
        f"{start}{'FAILED' if row['error'] else 'EXCEEDS'} "
        f"{' '.join(str(row[name]) for name in NAMES)} {tile(row)}: "
        f"{row['error'] or row['violation']}{end}"
        for row in rows
        if row["error"] or row["violation"]
    ]
    return "\n".join(lines) or f"all {len(rows)} kernels compile and keep the limits"


def summary(rows: Sequence[Row]) -> dict[str, Any]:
    """Counts, and the range of registers by vLLM's of each GPU."""
    ratios: dict[str, list[float]] = {}
    for row in rows:
        if row["registers_to_vllm"] is not None:
            ratios.setdefault(row["arch"], []).append(row["registers_to_vllm"])
    kinds = Counter(
        part.split(" ")[0] for row in rows for part in row["violation"].split("; ") if part
    )
    return {
        "kernels": len(rows),
        "failed": sum(bool(row["error"]) for row in rows),
        "violations": dict(kinds),
        "registers_to_vllm": {arch: [min(x), max(x)] for arch, x in ratios.items()},
    }
