"""A load of requests by `vllm bench serve`, its latencies, and levels of service.

The levels are MLPerf Inference's for Llama 3.1 8B, in its interactive and its server scenario: a
load meets a level if the 99th percentiles of the time to first token and of the time per output
token are within the limits. Goodput is the rate of requests that are within both (DistServe, arXiv
2401.09670).
"""

from __future__ import annotations

import contextlib
import json
import re
import signal
import sys
from collections.abc import AsyncIterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import typer
from numpy.typing import NDArray

from benchmarks.checkpoints import ServerCase
from benchmarks.options import RequestOptions
from benchmarks.servers import MODEL, Server, free_port, watch, while_alive
from serving.launch.process import HOST, LaunchError, Service

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Load:
    """How requests arrive.

    Attributes:
        rate: requests/s, at random times (Poisson); infinite: all at once.
        concurrency: requests at a time at most, the next when one has ended; 0: any number.
    """

    rate: float = float("inf")
    concurrency: int = 0

    def __str__(self) -> str:
        if self.concurrency:
            return f"{self.concurrency} at a time"
        return "all at once" if self.rate == float("inf") else f"{self.rate:g}/s"


@dataclass(frozen=True)
class Level:
    """Limits in ms of the time to first token and of the time per output token after it."""

    name: str
    ttft_ms: float
    tpot_ms: float

    def __str__(self) -> str:
        return f"{self.name}={self.ttft_ms:g}:{self.tpot_ms:g}"


LEVELS = (Level("interactive", 500, 30), Level("server", 2000, 100))


def level(text: str) -> Level:
    """Read `NAME=ttft_ms:tpot_ms`."""
    found = re.fullmatch(r"([A-Za-z]\w*)=(\d+\.?\d*):(\d+\.?\d*)", text)
    if found is None or not (float(found[2]) > 0 and float(found[3]) > 0):
        raise typer.BadParameter(f"{text!r} is not like interactive=500:30 (ms)")
    return Level(found[1], float(found[2]), float(found[3]))


@dataclass(frozen=True)
class LoadClient:
    """What `vllm bench serve` sends: so many random requests, with a folder for its results and its
    log. With `sample` the server's metrics are asked, too, how many run."""

    shape: RequestOptions
    requests: int
    folder: Path
    sample: bool = False

    async def send(self, server: Server, url: str, load: Load, seed: int, name: str) -> LoadResult:
        """Send requests to `url`, the server or a gateway before it, and return their latencies.
        The seed is that of prompts and times; the result's file gets the name."""
        result = self.folder / f"{name}.json"
        command = [str(Path(sys.executable).with_name("vllm")), "bench", "serve"]
        command += ["--backend=openai", f"--base-url={url}", "--endpoint=/v1/completions"]
        command += [f"--model={MODEL}", f"--tokenizer={server.ckpt}", "--dataset-name=random"]
        command += [f"--num-prompts={self.requests}", f"--seed={seed}", "--temperature=0"]
        command += [f"--random-input-len={self.shape.prompt_len}", "--ignore-eos"]
        command += [f"--random-output-len={self.shape.new_tokens}", "--disable-tqdm"]
        command += [f"--request-rate={load.rate:g}"]
        command += [f"--max-concurrency={load.concurrency}"] * bool(load.concurrency)
        command += ["--save-result", "--save-detailed"]
        command += [f"--result-dir={result.parent}", f"--result-filename={result.name}"]
        client = Service("client", free_port(), self.folder)
        try:
            await client.start(command, {"OMP_NUM_THREADS": "1", "VLLM_PLUGINS": ""})
            assert client.process is not None
            work, running = while_alive(server.service, client.process.wait()), None
            if self.sample:
                code, seen = await watch(server, work)
                running = int(max(seen.running))
            else:
                code = await work
            if code:
                raise client.failed(f"ended with exit code {code}", code)
            return replace(read(result), running=running)
        finally:
            await client.stop()


@dataclass(frozen=True)
class LoadResult:
    """What one load gave.

    Attributes:
        seconds: from the first request to the last answer's end.
        tokens: of all answers.
        ttft: time to first token `[requests]`, ms.
        tpot: time per output token after the first `[requests]`, ms; 0 for answers of one token.
        itl: ms between two events of a stream `[events]`.
        running: the most requests that ran at once, if the server was asked.
    """

    seconds: float
    tokens: int
    ttft: Floats
    tpot: Floats
    itl: Floats
    running: int | None = None

    def good(self, level: Level) -> int:
        """Return how many requests are within a level's limits."""
        return int(((self.ttft <= level.ttft_ms) & (self.tpot <= level.tpot_ms)).sum())

    def meets(self, level: Level) -> bool:
        """Return whether the 99th percentiles are within the limits."""
        ttft, tpot = np.percentile(self.ttft, 99), np.percentile(self.tpot, 99)
        return bool(ttft <= level.ttft_ms and tpot <= level.tpot_ms)


Runs = dict[tuple[str, Load], dict[int, LoadResult]]
"""By a subject's name and the load, then by the round."""


@dataclass(frozen=True)
class Subject:
    """What is measured: a server, directly or through a gateway in front of it."""

    case: ServerCase
    server: Server
    through_gateway: bool = False

    @property
    def name(self) -> str:
        """Name of its rows."""
        return self.case.name + (" + gateway" if self.through_gateway else "")

    @contextlib.asynccontextmanager
    async def awake(self, log_folder: Path) -> AsyncIterator[str]:
        """Yield its URL while its processes run. A gateway is started for the turn: one that slept
        would have to find out first that its server is alive."""
        gateway = Service("gateway", free_port(), log_folder)
        self.server.signal(signal.SIGCONT)
        try:
            if not self.through_gateway:
                yield self.server.service.url
                return
            environment = {"GATEWAY_HOST": HOST, "GATEWAY_PORT": str(gateway.port)}
            environment["UPSTREAM_URL"] = self.server.service.url
            await gateway.start([sys.executable, "-m", "serving"], environment)
            await while_alive(gateway, gateway.ready("/v1/models"))
            yield gateway.url
        finally:
            await gateway.stop()
            self.server.signal(signal.SIGSTOP)


def read(path: Path) -> LoadResult:
    """Read what `vllm bench serve --save-result --save-detailed` has written."""
    try:
        found = json.loads(path.read_text())
    except OSError as error:
        raise LaunchError(f"vllm bench serve left no result: {error}") from None
    if found["failed"]:
        why = next(error for error in found["errors"] if error)
        reason = why.strip().splitlines()[-1]
        raise LaunchError(f"{found['failed']} of {found['num_prompts']} requests failed: {reason}")
    ttft, latency = np.array(found["ttfts"]), np.array(found["latencies"])
    later = np.array(found["output_lens"]) - 1
    tpot = np.where(later > 0, (latency - ttft) / np.maximum(later, 1), 0.0)
    itl = np.concatenate([np.array(gaps, dtype=float) for gaps in found["itls"]])
    tokens = found["total_output_tokens"]
    return LoadResult(found["duration"], tokens, ttft * 1000, tpot * 1000, itl * 1000)


def together(rounds: Sequence[LoadResult]) -> LoadResult:
    """Return all rounds as one, one after another."""
    names = ("ttft", "tpot", "itl")
    ttft, tpot, itl = (np.concatenate([getattr(r, name) for r in rounds]) for name in names)
    running = max((each.running for each in rounds if each.running is not None), default=None)
    seconds, tokens = sum(each.seconds for each in rounds), sum(each.tokens for each in rounds)
    return LoadResult(seconds, tokens, ttft, tpot, itl, running)
