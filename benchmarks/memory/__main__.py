"""Memory of `vllm serve`: what config.json says it must be, and what it is.

For each checkpoint, packed (--packed) or not, and selective attention also within budgets
(--kv-budgets), one server after another is started and measured:

  KV a request, a token  blocks that a lone request takes (vLLM's metrics) x bytes of a block (as
                         allocated in the worker); a token: by the request's tokens
  requests in flight     the most that run at once when more are sent than the KV cache holds
  KV cache resident      its pages that are in memory; vLLM fills it with zeros at the start
  weights                what the worker's own memory grows by while they are loaded and packed

and, as the system counts them for all processes, PSS and RSS when idle and the largest RSS. These
have no prediction: most of them is Python and its libraries. A ratio is measured by predicted. No
time is measured: other work on the machine does not matter.

    python -m benchmarks.memory --enforce-eager --packed w4
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from matplotlib.figure import Figure
from tqdm import tqdm

from attnserve.options import command_line, positive
from benchmarks import RESULTS
from benchmarks.cases import Case, add_options, cases_of, described
from benchmarks.memory.measure import measure
from benchmarks.memory.predict import QUANTITIES, predict
from benchmarks.servers import append_csv, config_of, until_signal
from serving.launch.process import LaunchError

CSV = RESULTS / "memory_cpu.csv"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `cases` is what it asks to measure.

    Raises:
        LaunchError: with the reason in one line.
    """
    parser, add = command_line("benchmarks.memory", __doc__)
    add_options(parser, add, CSV, 16 << 20)
    add("--prompt-len", "tokens of a prompt", type=positive, default=400)
    add("--new-tokens", "tokens of an answer", type=positive, default=112)
    add("--seed", "of the random prompts", type=int, default=0)
    options = parser.parse_args(arguments)
    options.cases = cases_of(options)
    length = options.prompt_len + options.new_tokens
    for case in options.cases:
        limit = config_of(case.ckpt)["max_position_embeddings"]
        if length > limit:
            raise LaunchError(f"prompt and answer take {length} tokens, {case.name} {limit}", 2)
        if not predict(case, options)["requests_in_flight"]:
            raise LaunchError(
                f"--kv-cache-memory-bytes has no room for a request of {case.name}", 2
            )
    return options


def row_of(
    case: Case, predicted: dict[str, float], found: dict[str, Any], error: str = ""
) -> dict[str, Any]:
    """Predicted, measured and their ratio; what else was measured."""
    row: dict[str, Any] = dict(case.columns())
    for name in QUANTITIES:
        row[f"{name}_predicted"] = predicted[name]
        row[f"{name}_measured"] = found.get(name)
        row[f"{name}_ratio"] = found[name] / predicted[name] if name in found else None
    return row | {k: v for k, v in found.items() if k not in QUANTITIES} | {"error": error}


async def measure_all(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    """Every case, one after another, into `rows` as they come."""
    for case in tqdm(options.cases, unit="case"):
        predicted = predict(case, options)
        try:
            rows.append(row_of(case, predicted, await measure(case, predicted, options)))
        except LaunchError as error:
            print(f"benchmarks.memory: {case.name} failed: {error}", file=sys.stderr)
            rows.append(row_of(case, predicted, {}, str(error)))


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For people: `predicted > measured (ratio)`; sizes in KB and MB of 10^3 and 10^6 bytes."""
    units = {"kv_bytes_per_token": 1e3, "kv_bytes_per_request": 1e6, "requests_in_flight": 1}
    lines = []
    for row in rows:
        line = {"case": row["case"], "weights": row["weights"]}
        for name, label in QUANTITIES.items():
            unit = units.get(name, 1e6)
            shown = label.replace("bytes", {1e3: "KB", 1e6: "MB"}.get(unit, ""))
            predicted, found = row[f"{name}_predicted"] / unit, row[f"{name}_measured"]
            ratio = row[f"{name}_ratio"]
            measured = "failed" if found is None else f"{found / unit:.4g} ({ratio:.3f})"
            line[shown] = f"{predicted:.4g} > {measured}"
        for name, label in (("pss", "PSS"), ("rss", "RSS"), ("rss_full", "RSS full")):
            size = row.get(f"{name}_bytes")
            line[f"{label} MB"] = "" if size is None else f"{size / 1e6:.0f}"
        lines.append(line)
    return pd.DataFrame(lines).to_string(index=False)


def plot(path: Path, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """A PNG: a panel a quantity, predicted beside measured for each case, logarithmic.

    Args:
        path: the file.
        title: of the figure.
        rows: of the run.
    """
    rows = [row for row in rows if not row["error"]]
    figure = Figure(figsize=(3.4 * len(QUANTITIES), 4))
    figure.suptitle(title, fontsize=9)
    for index, (name, label) in enumerate(QUANTITIES.items(), 1):
        axes = figure.add_subplot(1, len(QUANTITIES), index)
        for shift, kind in ((-0.2, "predicted"), (0.2, "measured")):
            x = [i + shift for i in range(len(rows))]
            axes.bar(x, [row[f"{name}_{kind}"] for row in rows], width=0.4, label=kind)
        axes.set_yscale("log")
        axes.set_title(label, fontsize=9)
        names = [row["case"] for row in rows]
        axes.set_xticks(range(len(rows)), names, rotation=60, ha="right", fontsize=7)
    figure.axes[0].legend(fontsize=7)
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Command line: the table, and as last line one JSON object."""
    try:
        options = parse()
    except LaunchError as error:
        print(f"benchmarks.memory: {error}", file=sys.stderr)
        sys.exit(error.code)
    about = described(options, ("prompt_len", "new_tokens", "seed"))
    rows: list[dict[str, Any]] = []
    finished = asyncio.run(until_signal(measure_all(options, rows)))
    if rows and not options.no_save:
        append_csv(options.csv, about, rows)
        title = f"{about['machine']}, vLLM {about['vllm']}, {about['dtype']}"
        plot(options.csv.with_suffix(".png"), title, rows)
    if not finished:
        print("benchmarks.memory: interrupted; the server is stopped", file=sys.stderr)
    print(table(rows))
    print(json.dumps({**about, "rows": rows}))
    sys.exit(130 if not finished else 1 if any(row["error"] for row in rows) else 0)


if __name__ == "__main__":
    main()
