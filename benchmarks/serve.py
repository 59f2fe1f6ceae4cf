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
import os
import signal
import socket
import sys
import time
from collections.abc import Awaitable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import aiohttp
import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks import machine
from benchmarks.options import command_line, positive
from serving.launch import HOST, LaunchError, Service

CSV = machine.RESULTS / "serve_cpu.csv"
MODEL = "model"
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""vLLM's default binds every server to the same cores."""

T = TypeVar("T")


@dataclass(frozen=True)
class Answer:
    """One prompt's answer: when it was sent and when each token came, in s."""

    sent: float
    tokens: list[float]
    cached_tokens: int
    """Of the prompt; vLLM tells it for one prompt of a batch, so it is the same for all."""


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


class Peer:
    """One backend's server."""

    def __init__(self, backend: str, options: argparse.Namespace) -> None:
        self.backend = backend
        self.options = options
        self.service = Service(f"bench-{backend}", free_port(), options.log_folder)

    async def start(self) -> None:
        """Start its process; `service.ready` waits until it answers."""
        o = self.options
        command = [str(Path(sys.executable).with_name("vllm")), "serve", str(o.ckpt)]
        command += [f"--host={HOST}", f"--port={self.service.url.rpartition(':')[2]}"]
        command += [f"--served-model-name={MODEL}", f"--dtype={o.dtype}"]
        command += [f"--max-model-len={max(o.prompt_lens) + o.new_tokens}"]
        command += [f"--kv-cache-memory-bytes={o.kv_cache_memory_bytes}"]
        command += [f"--attention-backend={self.backend}", "--enable-prompt-tokens-details"]
        command += ["--enforce-eager"] if o.enforce_eager else []
        environment = {"OMP_NUM_THREADS": str(o.threads), **ENVIRONMENT}
        await self.service.start(command + o.vllm_args, environment)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its processes, all of them, if it has any."""
        process = self.service.process
        if process is not None and process.returncode is None:
            os.killpg(process.pid, number)

    async def stop(self) -> None:
        """End it, stopped or not, and leave nothing of it running."""
        self.signal(signal.SIGCONT)
        await self.service.stop()

    async def round(self, prompts: list[list[int]], n: int) -> list[Answer]:
        """Streamed greedy completions of `n` tokens, all prompts at once.

        They are one request, so that they reach the scheduler together: on separate connections the
        first may end before the last is read. The connection is new: vLLM closes idle ones.
        """
        body = {"model": MODEL, "prompt": prompts, "max_tokens": n, "temperature": 0.0}
        body |= {"ignore_eos": True, "return_token_ids": True}
        body |= {"stream": True, "stream_options": {"include_usage": True}}
        url = f"{self.service.url}/v1/completions"
        times: list[list[float]] = [[] for _ in prompts]
        usage: dict[str, Any] = {}
        timeout = aiohttp.ClientTimeout(total=None)
        self.signal(signal.SIGCONT)
        try:
            sent = time.perf_counter()
            async with aiohttp.request("POST", url, json=body, timeout=timeout) as answer:
                if answer.status != 200:
                    raise self.service.failed(f"answered {answer.status}")
                async for line in answer.content:
                    if not line.startswith(b"data: {"):
                        continue
                    now = time.perf_counter()
                    event = json.loads(line.removeprefix(b"data: "))
                    if "error" in event:
                        raise self.service.failed("broke off an answer")
                    for choice in event["choices"]:
                        times[choice["index"]] += [now] * len(choice["token_ids"] or ())
                    usage = event.get("usage") or usage
        except aiohttp.ClientError as error:
            raise self.service.failed(f"broke the connection ({error})") from error
        finally:
            self.signal(signal.SIGSTOP)
        if {len(tokens) for tokens in times} != {n}:
            raise self.service.failed(f"did not answer each prompt with {n} tokens")
        cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens", 0)
        return [Answer(sent, tokens, cached) for tokens in times]


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


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


async def measure(peers: Sequence[Peer], options: argparse.Namespace) -> list[Case]:
    """Every case, all backends in turn; the order of the turn is reversed every other round."""
    rng = np.random.default_rng(options.seed)
    vocabulary = json.loads((options.ckpt / "config.json").read_text())["vocab_size"]
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


async def while_alive(peers: Sequence[Peer], work: Awaitable[T]) -> T:
    """Do the work, unless a server ends meanwhile: then raise what that server says."""
    tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(work)]
    tasks += [asyncio.ensure_future(peer.service.ended()) for peer in peers]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        result: T = next(task for task in tasks if task in done).result()
        return result
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def ready(peer: Peer) -> None:
    """Wait until a server answers, then stop it until its turn comes."""
    await peer.service.ready("/health")
    peer.signal(signal.SIGSTOP)


async def run(options: argparse.Namespace) -> list[Case]:
    """Start the servers, measure, and end them whatever happens."""
    task = asyncio.current_task()
    assert task is not None
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    peers = [Peer(backend, options) for backend in options.backends]
    try:
        for peer in peers:
            print(f"starting {peer.backend} (log: {peer.service.log_file})", flush=True)
            await peer.start()
        try:
            async with asyncio.timeout(options.start_timeout):
                await while_alive(peers, asyncio.gather(*map(ready, peers)))
        except TimeoutError:
            raise LaunchError(f"a server did not start in {options.start_timeout} s") from None
        return await while_alive(peers, measure(peers, options))
    finally:
        await asyncio.gather(*(peer.stop() for peer in peers))


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


def append_csv(path: Path, run: dict[str, Any], rows: Sequence[dict[str, Any]]) -> None:
    """Add rows to a CSV file, made if missing; columns it does not have yet come last."""
    added = pd.DataFrame([{**run, **row} for row in rows]).drop(columns="decode_ratios")
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():  # as text: what is in it stays as it is
        added = pd.concat([pd.read_csv(path, dtype=str, keep_default_na=False), added])
    partial = path.with_name(path.name + ".partial")
    added.to_csv(partial, index=False, float_format="%.6g")
    partial.replace(path)


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
    parser, add = command_line("benchmarks.serve", __doc__)
    add("--ckpt", "the checkpoint's folder", type=Path, required=True)
    backends = ["cpu_attn", "softmax", "softpick"]
    add("--backends", "names, the first is what others compare to", nargs="+", default=backends)
    lengths = {"type": positive, "nargs": "+"}
    add("--prompt-lens", "tokens of a prompt", default=[1024, 4096], **lengths)
    add("--batches", "requests at once", default=[1, 8], **lengths)
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
    check(options)
    return options


def check(options: argparse.Namespace) -> None:
    """Refuse now what would fail after minutes.

    Raises:
        LaunchError: with the reason in one line.
    """
    try:
        config = json.loads((options.ckpt / "config.json").read_text())
    except OSError as error:
        raise LaunchError(f"--ckpt {options.ckpt} is not a checkpoint: {error}", 2) from None
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
        rows = results(options.backends, asyncio.run(run(options)))
    except LaunchError as error:
        print(f"benchmarks.serve: {error}", file=sys.stderr)
        sys.exit(error.code)
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("benchmarks.serve: interrupted; all servers are stopped", file=sys.stderr)
        sys.exit(130)
    about = described(options)
    if not options.no_save:
        append_csv(options.csv, about, rows)
    print(table(rows))
    print(json.dumps({**about, "rows": rows}))


if __name__ == "__main__":
    main()
