"""Rows, table and plot of `benchmarks.serve`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.checkpoints import weight_bytes
from benchmarks.serve.load import Level, Load, LoadResult, Runs, Subject, together


def figures(requests: LoadResult) -> dict[str, float]:
    """Return what is compared in each round."""
    return {
        "tokens_per_s": requests.tokens / requests.seconds,
        "ttft_ms": median(requests.ttft),
        "tpot_ms": median(requests.tpot),
    }


def row_of(
    load: Load, rounds: dict[int, LoadResult], peer: dict[int, LoadResult], levels: Sequence[Level]
) -> results.Row:
    """Return a subject's figures of one load: percentiles over the requests of all rounds; ratios
    to the peer in the same round, their median and range."""
    every = together(list(rounds.values()))
    total = len(every.ttft)
    row: results.Row = {"request_rate": "inf" if load.rate == float("inf") else load.rate}
    row |= {"concurrency": load.concurrency or None, "running": every.running}
    row |= {"requests": total, "requests_per_s": total / every.seconds}
    row["tokens_per_s"] = median(figures(one)["tokens_per_s"] for one in rounds.values())
    for name in ("ttft", "tpot", "itl"):
        for q in (50, 99):
            row[f"{name}_ms_p{q}"] = float(np.percentile(getattr(every, name), q))
    pairs = [(figures(rounds[i]), figures(peer[i])) for i in rounds if i in peer]
    for name in figures(every):
        ratios = [mine[name] / its[name] for mine, its in pairs]
        row[f"{name}_ratio"] = median(ratios) if ratios else None
        row[f"{name}_ratio_min"] = min(ratios, default=None)
        row[f"{name}_ratio_max"] = max(ratios, default=None)
    for level in levels:
        good = every.good(level)
        row[f"{level.name}_limits_ms"] = f"{level.ttft_ms:g}:{level.tpot_ms:g}"
        row[f"{level.name}_goodput"] = good / every.seconds
        row[f"{level.name}_share"] = good / total
        row[f"{level.name}_met"] = every.meets(level)
    return row


def rows_of(
    subjects: Sequence[Subject],
    loads: Sequence[Load],
    levels: Sequence[Level],
    runs: Runs,
    failed: dict[str, str],
) -> list[results.Row]:
    """Return one row a subject and load, and of one that failed a row that says why. The first
    subject is the peer."""
    rows = []
    for subject in subjects:
        case = subject.case
        columns: results.Row = {**case.columns(), "case": subject.name}
        columns["path"] = "gateway" if subject.through_gateway else "direct"
        for load in loads:
            if rounds := runs.get((subject.name, load)):
                peer = runs.get((subjects[0].name, load), {})
                row = row_of(load, rounds, peer, levels)
                row["weight_bytes"] = weight_bytes(case.ckpt, case.dtype)
                rows.append({**columns, "rounds": len(rounds), **row, "error": ""})
        if subject.name in failed:
            rows.append({**columns, "error": failed[subject.name]})
    return rows


def measured(rows: Sequence[dict[str, Any]]) -> list[results.Row]:
    """Return the rows without an error, with their loads in words."""
    return [
        {**row, "load": str(Load(float(row["request_rate"]), row["concurrency"] or 0))}
        for row in rows
        if not row["error"]
    ]


def table(rows: Sequence[dict[str, Any]], levels: Sequence[Level]) -> str:
    """Return p50 and p99 of latencies; `*` where a level is met."""

    def ratio(row: dict[str, Any], name: str) -> str:
        if row[f"{name}_ratio"] is None:
            return ""
        low, mid, high = (row[f"{name}_ratio{end}"] for end in ("_min", "", "_max"))
        return f"{mid:.2f} ({low:.2f}-{high:.2f})"

    lines = []
    for row in measured(rows):
        line = {"case": row["case"], "load": row["load"]}
        if row["running"] is not None:
            line["in flight"] = row["running"]
        line |= {"req/s": f"{row['requests_per_s']:.2f}", "tokens/s": f"{row['tokens_per_s']:.0f}"}
        line["x peer"] = ratio(row, "tokens_per_s")
        for name in ("ttft", "tpot", "itl"):
            line[f"{name.upper()} ms"] = f"{row[name + '_ms_p50']:.1f} {row[name + '_ms_p99']:.1f}"
        line["TPOT x peer"] = ratio(row, "tpot_ms")
        for level in levels:
            met = "*" if row[f"{level.name}_met"] else " "
            line[f"goodput {level}"] = f"{row[f'{level.name}_goodput']:.2f}{met}"
        lines.append(line)
    return results.table(lines)


def capacity(rows: Sequence[dict[str, Any]], level: Level) -> dict[str, float]:
    """Return for each case the most requests/s among its loads that met a level; 0: none did."""
    found: dict[str, float] = {}
    for row in measured(rows):
        met = row["requests_per_s"] if row[f"{level.name}_met"] else 0.0
        found[row["case"]] = max(found.get(row["case"], 0.0), met)
    return found


def plot(path: Path, title: str, rows: Sequence[dict[str, Any]], levels: Sequence[Level]) -> None:
    """Write a PNG: tokens/s, then the goodput of each level, by the load."""
    panels = {"tokens/s": "tokens_per_s"}
    panels |= {f"requests/s within {each}": f"{each.name}_goodput" for each in levels}
    results.draw(
        path,
        title,
        [
            (panel, row["load"], row["case"], row[column])
            for panel, column in panels.items()
            for row in measured(rows)
        ],
    )
