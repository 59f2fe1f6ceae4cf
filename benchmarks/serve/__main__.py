"""Throughput and latency of `vllm serve` under load, and how much of it is within limits.

Each case is a real server: every checkpoint, packed (--packed) or not; selective attention with and
without budgets (--kv-budgets); directly or through this project's gateway (--gateway). The peer is
stock vLLM's own CPU attention on the first softmax checkpoint. All servers are up at once and take
turns at `vllm bench serve` (random prompts, Poisson arrivals, one seed a round); whoever is not
measured is stopped. Ratios are to the peer in the same round: tokens/s above 1 are more, TTFT and
TPOT below 1 are faster.

  TTFT     time to first token
  TPOT     time per output token after the first, a mean over the request
  ITL      time between two tokens
  goodput  requests/s whose TTFT and TPOT are within a level's limits

A load meets a level (* in the table) if the 99th percentiles of TTFT and TPOT are within its
limits. The levels are those of MLPerf Inference for Llama 3.1 8B, which suit a model of a few
million parameters on two CPU cores; for others give --level. MLPerf asks for 270,336 requests for a
99th percentile: with the few of a run here it is little more than the slowest one.

A case that fails is reported and left out; the others go on, and what was measured is saved (also
after Ctrl-C).

    python -m benchmarks.serve --enforce-eager
    python -m quant.quantize checkpoints/softpick w4 --bits 4 --scheme gptq --embeddings 8
    python -m benchmarks.serve --enforce-eager --packed w4 --gateway all
"""

from __future__ import annotations

import argparse
import asyncio
import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from attnserve.options import command_line, positive
from benchmarks import RESULTS
from benchmarks.cases import add_options, cases_of, described
from benchmarks.serve.levels import LEVELS, level
from benchmarks.serve.measure import SLACK, Runs, Subject, measure, server_of
from benchmarks.serve.report import capacity, plot, results, table
from benchmarks.servers import append_csv, config_of, until_signal
from serving.launch.process import LaunchError

CSV = RESULTS / "serve_cpu.csv"


def rate(text: str) -> float:
    """Requests/s above 0, for argparse; `inf`: all at once."""
    try:
        found = float(text)
    except ValueError:
        found = 0.0
    if not found > 0:
        raise argparse.ArgumentTypeError(f"{text!r} is not a rate above 0, or inf")
    return found


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line; `subjects` is what it asks to measure."""
    parser, add = command_line("benchmarks.serve", __doc__)
    add_options(parser, add, CSV, 256 << 20)
    text = "which servers are also measured through the gateway; one: the first that is ours"
    add("--gateway", text, choices=("none", "one", "all"), default="one")
    parser.add_argument("--no-stock", action="store_true", help="no peer of stock vLLM")
    text = "offered, in requests/s; inf: all at once"
    add("--request-rates", text, type=rate, nargs="+", default=[4.0, 16.0, float("inf")])
    add("--requests", "of each load", type=positive, default=48)
    add("--rounds", "loads of each case and rate", type=positive, default=3)
    add("--prompt-len", "tokens of a prompt", type=positive, default=128)
    add("--new-tokens", "tokens of an answer", type=positive, default=32)
    add("--seed", "of prompts and arrivals in the first round", type=int, default=0)
    text = "of service, as NAME=ttft_ms:tpot_ms; in place of these: " + " ".join(map(str, LEVELS))
    parser.add_argument("--level", dest="levels", action="append", type=level, help=text)
    options = parser.parse_args(arguments)
    options.levels = options.levels or LEVELS
    options.results = options.log_folder / "bench-serve"
    options.subjects = subjects_of(options)
    return options


def subjects_of(options: argparse.Namespace) -> list[Subject]:
    """The peer first, then the cases, each followed by itself through the gateway if asked.

    Raises:
        LaunchError: with the reason in one line.
    """
    cases = cases_of(options)
    longest = options.prompt_len + options.new_tokens + SLACK
    for case in cases:
        limit = config_of(case.ckpt)["max_position_embeddings"]
        if longest > limit:
            raise LaunchError(
                f"prompt, answer and {SLACK} spare tokens are {longest}; {case.name} takes {limit}",
                2,
            )
    subjects = []
    if not options.no_stock:
        softmax = [c for c in cases if c.variant == "softmax" and c.ckpt not in options.packed]
        if not softmax:
            raise LaunchError("stock vLLM needs a softmax checkpoint; give one, or --no-stock", 2)
        stock = replace(softmax[0], name="stock", backend="cpu_attn")
        subjects.append(Subject(stock, server_of(stock, options)))
    for index, case in enumerate(cases):
        direct = Subject(case, server_of(case, options))
        subjects.append(direct)
        if options.gateway == "all" or (options.gateway == "one" and index == 0):
            subjects.append(replace(direct, through_gateway=True))
    return subjects


def main() -> None:
    """Command line: the table, and as last line one JSON object."""
    try:
        options = parse()
    except LaunchError as error:
        print(f"benchmarks.serve: {error}", file=sys.stderr)
        sys.exit(error.code)
    shutil.rmtree(options.results, ignore_errors=True)
    options.results.mkdir(parents=True)
    names = ("requests", "prompt_len", "new_tokens", "seed")
    about = described(options, names)
    runs: Runs = {}
    failed: dict[str, str] = {}
    finished = asyncio.run(until_signal(measure(options.subjects, options, runs, failed)))
    rows = results(options.subjects, options.request_rates, options.levels, runs, failed)
    most = {level.name: capacity(rows, level) for level in options.levels}
    if rows and not options.no_save:
        append_csv(options.csv, about, rows)
        title = f"{about['machine']}, {about['cores']} cores, vLLM {about['vllm']}, {about['mode']}"
        plot(options.csv.with_suffix(".png"), title, rows, options.levels)
    print(table(rows, options.levels))
    for name, found in most.items():
        met = ", ".join(f"{case} {value:.2f}" for case, value in found.items())
        print(f"most requests/s that met {name}: {met}")
    if not finished:
        print("benchmarks.serve: interrupted; all servers are stopped", file=sys.stderr)
    for case, reason in failed.items():
        print(f"benchmarks.serve: {case} failed: {reason}", file=sys.stderr)
    document: dict[str, Any] = {**about, "most_requests_per_s": most, "rows": rows}
    print(json.dumps(document))
    sys.exit(130 if not finished else 1 if failed else 0)


if __name__ == "__main__":
    main()
