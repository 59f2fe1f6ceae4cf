"""The command of `benchmarks.memory`, its rows, table and plot."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import typer
from tqdm import tqdm

from attnserve.command import INTERRUPTED, AsJson, main, options_of
from attnserve.errors import UserError
from benchmarks import RESULTS, results
from benchmarks import options as opt
from benchmarks.checkpoints import CaseOptions, ServerCase, check_room
from benchmarks.servers import interrupted
from serving.launch.process import LaunchError

CSV = RESULTS / "memory_cpu.csv"
QUANTITIES = {
    "kv_bytes_per_token": "KV bytes a token",
    "kv_bytes_per_request": "KV bytes a request",
    "requests_in_flight": "requests in flight",
    "kv_cache_bytes": "bytes of KV cache resident",
    "weight_bytes": "bytes of weights",
}
"""What is predicted and measured, and how people call it."""


@dataclass(frozen=True)
class MemoryRequests(opt.RequestOptions):
    """Requests that are long enough to be seen while they run."""

    prompt_len: opt.PromptLen = 400
    new_tokens: opt.NewTokens = 112


@dataclass(frozen=True)
class MemoryServers(opt.ServerOptions):
    """Servers whose cache a few of these requests fill."""

    kv_cache_memory_bytes: opt.CacheBytes = 16 << 20


@options_of(CaseOptions, MemoryRequests, MemoryServers)
def memory(
    context: typer.Context,
    what: CaseOptions,
    requests: MemoryRequests,
    servers: MemoryServers,
    csv: opt.Csv = CSV,
    no_save: opt.NoSave = False,
    as_json: AsJson = False,
) -> int:
    """Measure the memory of `vllm serve`: what config.json says it must be, and what it is.

    For each checkpoint, packed (--packed) or not, and selective attention also within budgets
    (--kv-budgets), one server after another is started and measured:

      KV a request, a token  blocks that a lone request takes (vLLM's metrics) x bytes of a block
                             (as allocated in the worker); a token: by the request's tokens
      requests in flight     the most that run at once when more are sent than the cache holds
      KV cache resident      its pages that are in memory; vLLM fills it with zeros at the start
      weights                what the worker's own memory grows by while they are loaded and packed

    and, as the system counts them for all processes, PSS and RSS when idle and the largest RSS.
    These have no prediction: most of them is Python and its libraries. A ratio is measured by
    predicted. No time is measured: other work on the machine does not matter. What follows `--` is
    passed on to `vllm serve`.

        python -m benchmarks.memory --enforce-eager --packed w4
    """
    from benchmarks.memory.measure import predict

    cases = what.cases()
    for case in cases:
        check_room(case.ckpt, requests.length)
        if not predict(case, requests, servers)["requests_in_flight"]:
            raise UserError(f"--kv-cache-memory-bytes has no room for a request of {case.name}")
    save = results.checked(csv, no_save)
    about = servers.described(**asdict(requests), vllm_args=" ".join(context.args))
    rows: list[results.Row] = []
    work = measure_all(cases, requests, servers, context.args, rows)
    stopped = interrupted(work, "python -m benchmarks.memory")
    if rows and save is not None:
        title = f"{about['machine']}, vLLM {about['vllm']}, {cases[0].dtype}"
        plot(save.with_suffix(".png"), title, rows)
    results.report(about, rows, table(rows), csv=save, as_json=as_json)
    return INTERRUPTED if stopped else int(any(row["error"] for row in rows))


async def measure_all(
    cases: Sequence[ServerCase],
    requests: opt.RequestOptions,
    servers: opt.ServerOptions,
    vllm_args: Sequence[str],
    rows: list[results.Row],
) -> None:
    """Measure every case, one after another, into `rows` as they come."""
    from benchmarks.memory.measure import measure, predict

    for case in tqdm(cases, unit="case"):
        predicted = predict(case, requests, servers)
        try:
            found = await measure(case, requests, servers, vllm_args)
            rows.append(row_of(case, predicted, found))
        except LaunchError as error:
            print(f"benchmarks.memory: {case.name} failed: {error}", file=sys.stderr)
            rows.append(row_of(case, predicted, {}, str(error)))


def row_of(
    case: ServerCase, predicted: dict[str, float], found: dict[str, Any], error: str = ""
) -> results.Row:
    """Return predicted, measured and their ratio, and what else was measured."""
    row: results.Row = dict(case.columns())
    for name in predicted:
        row[f"{name}_predicted"] = predicted[name]
        row[f"{name}_measured"] = found.get(name)
        row[f"{name}_ratio"] = found[name] / predicted[name] if name in found else None
    return row | {k: v for k, v in found.items() if k not in predicted} | {"error": error}


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return `predicted > measured (ratio)`; sizes in KB and MB of 10^3 and 10^6 bytes."""
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
    return results.table(lines)


def plot(path: Path, title: str, rows: Sequence[dict[str, Any]]) -> None:
    """Write a PNG: a panel a quantity, predicted beside measured for each case, logarithmic."""
    points = [
        (label, row["case"], kind, row[f"{name}_{kind}"])
        for name, label in QUANTITIES.items()
        for row in rows
        for kind in ("predicted", "measured")
        if not row["error"]
    ]
    results.draw(path, title, points, kind="bar", logy=True)


if __name__ == "__main__":
    main(memory, "python -m benchmarks.memory", others=True)
