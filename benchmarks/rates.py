"""Tokens per second and time to first token of `vllm serve`, one real server per attention backend.

All servers are up at once and take turns, round by round, so that what changes the machine's speed
meets all of them; whoever is not measured is stopped (SIGSTOP), because an idle vLLM worker polls
its queue with 2-3 % of a core. Ratios are made inside a round, against the first backend.

A case (prompt length x batch) begins with uncached rounds: fresh prompts, one token each, for the
prefill rate. The decode rounds after them send the last of those prompts again, so that they find
their prefix in the cache and are short. (A stateful variant has no prefix cache: its decode rounds
compute the prompt again, which takes longer but is not part of the decode rate.)
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
from tqdm import tqdm

from attnserve import machine
from attnserve.options import command_line, positive
from benchmarks import RESULTS
from benchmarks.servers import Answer, Server, append_csv, config_of, run, variant_of
from serving.launch.process import LaunchError

CSV = RESULTS / "rates_cpu.csv"
BACKENDS = ("cpu_attn", "softmax", "softpick")
LENGTHS = (1024, 4096)


@dataclass(frozen=True)
class Round:
    """What one batch of concurrent requests gave."""

    rate: float
    """Tokens/s: of the prompts in an uncached round, of the answers in a decode round."""
    ttft: float
    """Median over the requests, in s."""
    cached: float
    """Share of the prompt tokens that came from the prefix cache."""


@dataclass
class Case:
    """One prompt length and batch: the rounds of each backend, in the order of the backends."""

    prompt_len: int
    batch: int
    prefill: list[list[Round]] = field(default_factory=list)
    """`[round][backend]`"""
    decode: list[list[Round]] = field(default_factory=list)
    """`[round][backend]`"""


class Peer(Server):
    """One backend's server."""

    def __init__(self, backend: str, options: argparse.Namespace) -> None:
        o = options
        arguments = [f"--dtype={o.dtype}"]
        arguments += [f"--max-model-len={max(o.prompt_lens) + o.new_tokens}"]
        arguments += [f"--kv-cache-memory-bytes={o.kv_cache_memory_bytes}"]
        arguments += [f"--attention-backend={backend}", "--enable-prompt-tokens-details"]
        arguments += ["--enforce-eager"] if o.enforce_eager else []
        super().__init__(backend, o.ckpt, [*arguments, *o.vllm_args], o.threads, o.log_folder)


def decode_rate(answers: Sequence[Answer]) -> float:
    """Tokens/s while every request decodes: after the last first token, until one of them ends.

    Raises:
        LaunchError: there is no such time; the first request ended before the last one began.
    """
    begin = max(answer.tokens[0] for answer in answers)
    end = min(answer.tokens[-1] for answer in answers)
    count = sum(begin < at <= end for answer in answers for at in answer.tokens)
    if end <= begin or count == 0:
        raise LaunchError("the requests of a batch did not overlap; give more --new-tokens")
    return count / (end - begin)


def measured(answers: Sequence[Answer], prompt_len: int) -> Round:
    """The figures of a round; one of a single token each is a prefill round."""
    total = prompt_len * len(answers)
    if len(answers[0].tokens) == 1:
        took = max(a.tokens[0] for a in answers) - min(a.sent for a in answers)
        rate = total / took
    else:
        rate = decode_rate(answers)
    ttft = median(answer.tokens[0] - answer.sent for answer in answers)
    return Round(rate, ttft, sum(answer.cached_tokens for answer in answers) / total)


async def measure(peers: Sequence[Server], options: argparse.Namespace) -> list[Case]:
    """Every case, all backends in turn; the order of the turn is reversed every other round."""
    rng = np.random.default_rng(options.seed)
    vocabulary = config_of(options.ckpt)["vocab_size"]
    cases = [Case(length, batch) for length in options.prompt_lens for batch in options.batches]

    async def one_round(index: int, prompts: list[list[int]], n: int) -> list[Round]:
        order = list(range(len(peers)))[:: -1 if index % 2 else 1]
        found = {i: measured(await peers[i].round(prompts, n), len(prompts[0])) for i in order}
        return [found[i] for i in range(len(peers))]

    for peer in peers:  # a server's first prompt of some length takes three times as long as others
        await peer.round([[1] * min(options.prompt_lens)], 4)
    total = len(cases) * (options.prefill_rounds + options.rounds)
    with tqdm(total=total, unit="round", mininterval=5) as bar:
        for case in cases:
            bar.set_description(f"{case.prompt_len} x {case.batch}")
            shape = (case.batch, case.prompt_len)
            for index in range(options.prefill_rounds):
                prompts = rng.integers(1, vocabulary, shape).tolist()
                case.prefill.append(await one_round(index, prompts, 1))
                bar.update()
            for index in range(options.rounds):
                case.decode.append(await one_round(index, prompts, options.new_tokens))
                bar.update()
    return cases


def spread(prefix: str, samples: Sequence[float]) -> dict[str, float]:
    """Columns `<prefix>_p20`, `<prefix>_median` and `<prefix>_p80`; none without samples."""
    if not samples:
        return {}
    columns = (f"{prefix}_{name}" for name in ("p20", "median", "p80"))
    values = np.percentile(samples, (20, 50, 80))
    return {name: float(f"{v:.6g}") for name, v in zip(columns, values, strict=True)}


def results(backends: Sequence[str], cases: Sequence[Case]) -> list[dict[str, Any]]:
    """One row per case and backend; a ratio above 1 is faster than the first backend."""
    rows = []
    for case in cases:
        for i, backend in enumerate(backends):
            row: dict[str, Any] = {"backend": backend}
            row |= {"prompt_len": case.prompt_len, "batch": case.batch}
            for phase, rounds in (("decode", case.decode), ("prefill", case.prefill)):
                mine = [r[i] for r in rounds]
                ratios = [r[i].rate / r[0].rate for r in rounds]
                row |= spread(f"{phase}_tokens_per_s", [r.rate for r in mine])
                row |= spread(f"{phase}_ratio", ratios)
                ttft = "ttft_cached_s" if phase == "decode" else "ttft_uncached_s"
                row |= spread(ttft, [r.ttft for r in mine])
                row[f"{phase}_cached"] = float(np.mean([r.cached for r in mine]))
            row["decode_ratios"] = [round(r[i].rate / r[0].rate, 4) for r in case.decode]
            rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For people: medians, and in brackets p20 to p80."""

    def shown(row: dict[str, Any], name: str, digits: int) -> str:
        p20, mid, p80 = (row[f"{name}_{q}"] for q in ("p20", "median", "p80"))
        return f"{mid:.{digits}f} ({p20:.{digits}f}-{p80:.{digits}f})"

    lines = [
        {
            "backend": row["backend"],
            "prompt": row["prompt_len"],
            "batch": row["batch"],
            "decode tokens/s": shown(row, "decode_tokens_per_s", 1),
            "ratio": shown(row, "decode_ratio", 3),
            "prefill tokens/s": shown(row, "prefill_tokens_per_s", 0),
            "ratio ": shown(row, "prefill_ratio", 3),
            "TTFT cached s": f"{row['ttft_cached_s_median']:.3f}",
            "uncached s": f"{row['ttft_uncached_s_median']:.3f}",
            "cached": f"{row['decode_cached']:.0%}",
        }
        for row in rows
    ]
    return pd.DataFrame(lines).to_string(index=False)


def described(options: argparse.Namespace) -> dict[str, Any]:
    """What the run was made on and with."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.cpu_model(),
        "cores": machine.cores(),
        "threads": options.threads,
        "vllm": machine.package("vllm"),
        "torch": machine.package("torch"),
        "attnserve": machine.package("attnserve"),
        "commit": machine.commit(),
        "model": options.ckpt.resolve().name,
        "dtype": options.dtype,
        "mode": "eager" if options.enforce_eager else "compiled",
        "vllm_args": " ".join(options.vllm_args),
        "new_tokens": options.new_tokens,
        "rounds": options.rounds,
        "prefill_rounds": options.prefill_rounds,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser, add = command_line("benchmarks.rates", __doc__)
    add("--ckpt", "the checkpoint's folder", type=Path, required=True)
    parser.add_argument(
        "--backends",
        nargs="+",
        help="names, the first is what others compare to (default: the checkpoint's own, beside "
        f"vLLM's for softmax; {' '.join(BACKENDS)} if its config.json names none)",
    )
    parser.add_argument(
        "--prompt-lens",
        type=positive,
        nargs="+",
        help=f"tokens of a prompt (default: {' and '.join(map(str, LENGTHS))}, as far as the "
        "model has room, else what it has room for)",
    )
    add("--batches", "requests at once", type=positive, nargs="+", default=[1, 8])
    add("--new-tokens", "tokens of an answer", type=positive, default=64)
    add("--rounds", "decode rounds of each case", type=positive, default=5)
    add("--prefill-rounds", "uncached rounds of each case", type=positive, default=2)
    add("--dtype", "bfloat16 ends cpu_attn where AMX is not usable", default="float32")
    add("--threads", "OpenMP threads of a server", type=positive, default=machine.cores())
    add("--kv-cache-memory-bytes", "of each server, in bytes or as 2G", default="2G")
    add("--seed", "of the random prompts", type=int, default=0)
    add("--start-timeout", "longest start of all servers, in s", type=positive, default=1800)
    add("--csv", "rows are added to it", type=Path, default=CSV)
    add("--log-folder", "where the servers' logs go", type=Path, default=Path(".run"))
    parser.add_argument("--no-save", action="store_true", help="write no CSV")
    parser.add_argument(
        "--enforce-eager",
        action="store_true",
        help="do not compile the model (default: compile, as `vllm serve` does; takes 2-3 minutes "
        "of CPU per server at each start: vLLM 0.32 cannot load on a CPU what it has cached)",
    )
    parser.add_argument(
        "vllm_args", nargs="*", metavar="-- VLLM_ARGS", help="further arguments of `vllm serve`"
    )
    options = parser.parse_args(arguments)
    config = config_of(options.ckpt)
    own = variant_of(config)
    choices = {"": BACKENDS, "softmax": BACKENDS[:2]}
    options.backends = options.backends or list(choices.get(own, (own,)))
    room = config["max_position_embeddings"] - options.new_tokens
    fitting = [length for length in LENGTHS if length <= room] or [max(1, room)]
    options.prompt_lens = options.prompt_lens or fitting
    check(options)
    return options


def check(options: argparse.Namespace) -> None:
    """Refuse now what would fail after minutes.

    Raises:
        LaunchError: with the reason in one line.
    """
    config = config_of(options.ckpt)
    if options.new_tokens == 1:
        raise LaunchError("--new-tokens 1 has no decode step: give 2 or more", 2)
    longest = max(options.prompt_lens) + options.new_tokens
    limit = config["max_position_embeddings"]
    if longest > limit:
        raise LaunchError(f"prompt and answer take {longest} tokens, the model {limit}", 2)


def main() -> None:
    """Command line: the table, and as last line one JSON object."""
    try:
        options = parse()
        peers = [Peer(backend, options) for backend in options.backends]
        work = run(peers, measure(peers, options), options.start_timeout)
        rows = results(options.backends, asyncio.run(work))
    except LaunchError as error:
        print(f"benchmarks.rates: {error}", file=sys.stderr)
        sys.exit(error.code)
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("benchmarks.rates: interrupted; all servers are stopped", file=sys.stderr)
        sys.exit(130)
    about = described(options)
    if not options.no_save:
        append_csv(options.csv, about, rows, leave_out=["decode_ratios"])
    print(table(rows))
    print(json.dumps({**about, "rows": rows}))


if __name__ == "__main__":
    main()
