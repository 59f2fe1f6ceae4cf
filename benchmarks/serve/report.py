"""Rows, table and plot of `benchmarks.serve`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.figure import Figure

from benchmarks.serve.levels import Level, Requests, meets, together
from benchmarks.serve.measure import Runs, Subject


def shown(rate: float) -> float | str:
    """A rate as JSON can say it."""
    return "inf" if rate == float("inf") else rate


def label(row: dict[str, Any]) -> str:
    """A row's rate for people."""
    return f"{float(row['request_rate']):g}"


def figures(requests: Requests) -> dict[str, float]:
    """What is compared in each round."""
    return {
        "tokens_per_s": requests.tokens / requests.seconds,
        "ttft_ms": float(np.median(requests.ttft)),
        "tpot_ms": float(np.median(requests.tpot)),
    }


def row_of(
    subject: Subject,
    rate: float,
    rounds: dict[int, Requests],
    peer: dict[int, Requests],
    levels: Sequence[Level],
) -> dict[str, Any]:
    """One subject at one rate: percentiles over the requests of all rounds; ratios to the peer in
    the same round, their median and range."""
    all_rounds = together(list(rounds.values()))
    row: dict[str, Any] = {"request_rate": shown(rate), "requests": len(all_rounds.ttft)}
    row["requests_per_s"] = len(all_rounds.ttft) / all_rounds.seconds
    row["tokens_per_s"] = median(figures(one)["tokens_per_s"] for one in rounds.values())
    for name in ("ttft", "tpot", "itl"):
        for q in (50, 99):
            row[f"{name}_ms_p{q}"] = float(np.percentile(getattr(all_rounds, name), q))
    pairs = [(figures(rounds[i]), figures(peer[i])) for i in rounds if i in peer]
    for name in figures(all_rounds):
        ratios = [mine[name] / its[name] for mine, its in pairs]
        row[f"{name}_ratio"] = median(ratios) if ratios else None
        row[f"{name}_ratio_min"] = min(ratios, default=None)
        row[f"{name}_ratio_max"] = max(ratios, default=None)
    for level in levels:
        good = all_rounds.good(level)
        row[f"{level.name}_limits_ms"] = f"{level.ttft_ms:g}:{level.tpot_ms:g}"
        row[f"{level.name}_goodput"] = good / all_rounds.seconds
        row[f"{level.name}_share"] = good / len(all_rounds.ttft)
        row[f"{level.name}_met"] = meets(all_rounds, level)
    return row


def results(
    subjects: Sequence[Subject],
    rates: Sequence[float],
    levels: Sequence[Level],
    runs: Runs,
    failed: dict[str, str],
) -> list[dict[str, Any]]:
    """One row a subject and rate; of one that failed also a row that says why. The first subject is
    the peer."""
    rows = []
    for subject in subjects:
        columns = {**subject.case.columns(), "case": subject.name}
        columns["path"] = "gateway" if subject.through_gateway else "direct"
        for rate in rates:
            if rounds := runs.get((subject.name, rate)):
                peer = runs.get((subjects[0].name, rate), {})
                row = row_of(subject, rate, rounds, peer, levels)
                rows.append({**columns, "rounds": len(rounds), **row, "error": ""})
        if subject.name in failed:
            rows.append({**columns, "error": failed[subject.name]})
    return rows


def table(rows: Sequence[dict[str, Any]], levels: Sequence[Level]) -> str:
    """For people: p50 and p99 of latencies; `*` where a level is met."""

    def spread(row: dict[str, Any], name: str) -> str:
        if row[f"{name}_ratio"] is None:
            return ""
        low, mid, high = (row[f"{name}_ratio{end}"] for end in ("_min", "", "_max"))
        return f"{mid:.2f} ({low:.2f}-{high:.2f})"

    def goodput(row: dict[str, Any], level: Level) -> str:
        return f"{row[level.name + '_goodput']:.2f}{'*' if row[level.name + '_met'] else ' '}"

    lines = [
        {
            "case": row["case"],
            "rate": label(row),
            "req/s": f"{row['requests_per_s']:.2f}",
            "tokens/s": f"{row['tokens_per_s']:.0f}",
            "x peer": spread(row, "tokens_per_s"),
            **{
                f"{name.upper()} ms": f"{row[name + '_ms_p50']:.1f} {row[name + '_ms_p99']:.1f}"
                for name in ("ttft", "tpot", "itl")
            },
            "TPOT x peer": spread(row, "tpot_ms"),
            **{f"goodput {level}": goodput(row, level) for level in levels},
        }
        for row in rows
        if not row["error"]
    ]
    return pd.DataFrame(lines).to_string(index=False) if lines else "nothing was measured"


def capacity(rows: Sequence[dict[str, Any]], level: Level) -> dict[str, float]:
    """For each case the most requests/s among its loads that met a level; 0: none did."""
    found: dict[str, float] = {}
    for row in rows:
        if not row["error"]:
            met = row["requests_per_s"] if row[f"{level.name}_met"] else 0.0
            found[row["case"]] = max(found.get(row["case"], 0.0), met)
    return found


def plot(path: Path, title: str, rows: Sequence[dict[str, Any]], levels: Sequence[Level]) -> None:
    """A PNG: tokens/s, then the goodput of each level, by the rate of requests.

    Args:
        path: the file.
        title: of the figure.
        rows: of the run.
        levels: a panel each.
    """
    rows = [row for row in rows if not row["error"]]
    rates = list(dict.fromkeys(map(label, rows)))
    panels = {"tokens_per_s": "tokens/s"}
    for level in levels:
        limits = f"TTFT {level.ttft_ms:g} ms, TPOT {level.tpot_ms:g} ms"
        panels[f"{level.name}_goodput"] = f"{level.name}: requests/s within\n{limits}"
    figure = Figure(figsize=(5 * len(panels), 4.2))
    figure.suptitle(title, fontsize=9)
    for index, (column, text) in enumerate(panels.items(), 1):
        axes = figure.add_subplot(1, len(panels), index)
        for name, marker in zip(
            dict.fromkeys(row["case"] for row in rows), "osD^vP*X" * len(rows), strict=False
        ):
            mine = [row for row in rows if row["case"] == name]
            x = [rates.index(label(row)) for row in mine]
            axes.plot(x, [row[column] for row in mine], marker=marker, linestyle=":", label=name)
        axes.set_ylim(bottom=0)
        axes.set_ylabel(text)
        axes.set_xlabel("requests/s offered")
        axes.set_xticks(range(len(rates)), rates)
    figure.axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
