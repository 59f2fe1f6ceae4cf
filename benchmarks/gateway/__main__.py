"""CPU time of one request in a gateway, ours beside others.

All gateways stand in front of the same model server, a small one that streams events at an even
pace. In each round every gateway gets the same load in turn, and the order of the turn is reversed
every other round; its CPU time is read before and after (user and system, its children's too).
Added time to first token is against the same load sent straight to the model server ("direct"); it
needs an idle machine, because the load generator and the model server are processes, too. Memory is
what the process keeps resident after all rounds.

Three loads, of so many clients that each send a request as soon as the last one is answered:
`stream`, where they begin together and, answers being equally long, stay together, so that a
gateway gets all requests in one burst; `spread`, where they begin an equal part of an answer apart,
so that a request meets the other streams under way; and `whole`, not streamed, together.
"""

import argparse
import asyncio
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import aiohttp
import numpy as np
import pandas as pd
import psutil
import uvloop
from tqdm import tqdm

from attnserve import machine
from attnserve.files import CHECKOUT
from attnserve.options import command_line, positive
from benchmarks import RESULTS
from benchmarks.servers import append_csv
from serving.launch.process import HOST, LaunchError, Service, check_port

CSV = RESULTS / "gateway.csv"
OURS, DIRECT, ROUTER = "attnserve", "direct", "vllm-router"
NAMES = [OURS, "naive-aiohttp", "naive-httpx", ROUTER]
MODES = ("stream", "spread", "whole")
PROMPT = "It was the best of times, it was the worst of times. " * 4


@dataclass
class Peer:
    """One gateway (or the model server itself) and what was measured on it."""

    name: str
    url: str
    service: Service | None = None
    note: str = ""
    cpu_ms: dict[str, list[float]] = field(default_factory=dict)  # a request's, for each mode
    ttft_ms: dict[str, list[float]] = field(default_factory=dict)
    rss_mb: float = float("nan")

    def cpu_seconds(self) -> float:
        """CPU time of its processes so far."""
        if self.service is None:
            return 0.0
        assert self.service.process is not None
        root = psutil.Process(self.service.process.pid)
        times = [p.cpu_times() for p in (root, *root.children(recursive=True))]
        return sum(t.user + t.system for t in times)


def find_router() -> Path | None:
    """The command vllm-router: beside this Python, where `make conformance` puts it, or on PATH."""
    beside = Path(sys.executable).with_name(ROUTER)
    suites = CHECKOUT / "tests/conformance/.venv/bin" / ROUTER
    on_path = shutil.which(ROUTER)
    places = [beside, suites, *([Path(on_path)] if on_path else [])]
    return next((place for place in places if place.exists()), None)


def router_version(router: Path | None) -> str:
    """Of the distribution, as the Python beside the command knows it; empty if there is none."""
    if router is None:
        return ""
    code = f"import importlib.metadata as m; print(m.version('{ROUTER}'))"
    asked = [str(router.with_name("python")), "-c", code]
    try:
        done = subprocess.run(asked, capture_output=True, text=True, check=False)
    except OSError:
        return ""
    return done.stdout.strip()


def command(
    name: str, upstream: str, port: int, folder: Path, router: Path | None
) -> tuple[list[str], str] | None:
    """How to start a gateway, and the path that answers when it is up; None: not installed."""
    if name == OURS:
        file = folder / "gateway-benchmark.yaml"
        entry = {"name": "m", "variant": "softmax", "bits": 16, "replicas": [upstream]}
        file.write_text(json.dumps({"port": port, "models": [entry]}))  # JSON is YAML
        return [sys.executable, "-m", "serving", "--config", str(file)], "/metrics"
    if name == ROUTER:
        args = ["--worker-urls", upstream, "--host", HOST, "--port", str(port)]
        args += ["--policy", "round_robin", "--prometheus-port", str(port + 1000)]
        return ([str(router), *args], "/health") if router else None
    client = name.removeprefix("naive-")
    module = [sys.executable, "-m", "benchmarks.gateway.naive", client, upstream, str(port)]
    return module, "/openapi.json"


async def one(session: aiohttp.ClientSession, url: str, stream: bool, tokens: int) -> float:
    """One request; milliseconds to its first bytes.

    Raises:
        LaunchError: the answer is not what the model server sent.
    """
    body = {"model": "m", "prompt": PROMPT, "max_tokens": tokens, "stream": stream}
    began = time.perf_counter()
    first = 0.0
    events = size = 0
    async with session.post(f"{url}/v1/completions", json=body) as answer:
        async for piece in answer.content.iter_any():
            first = first or time.perf_counter()
            events += piece.count(b'"text"')
            size += len(piece)
    if answer.status != 200 or events != (tokens if stream else 1):
        raise LaunchError(f"{url} answered {answer.status} with {events} texts in {size} bytes")
    return (first - began) * 1000


async def load(url: str, mode: str, options: argparse.Namespace) -> list[float]:
    """So many requests, so many at a time; each one's time to the first bytes, in ms."""
    left = iter(range(options.requests))
    found: list[float] = []
    timeout = aiohttp.ClientTimeout(total=120)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def client(index: int) -> None:
            if mode == "spread":
                answer = options.tokens * options.pause_ms / 1000
                await asyncio.sleep(index * answer / options.concurrency)
            for _ in left:
                found.append(await one(session, url, mode != "whole", options.tokens))

        await asyncio.gather(*(client(index) for index in range(options.concurrency)))
    return found


async def measure(peers: Sequence[Peer], options: argparse.Namespace) -> None:
    """All rounds; the first is thrown away (connections, caches, compiled code)."""
    total = len(MODES) * (options.rounds + 1) * len(peers)
    with tqdm(total=total, unit="load", mininterval=5) as bar:
        for mode in MODES:
            for index in range(options.rounds + 1):
                for peer in peers[:: -1 if index % 2 else 1]:
                    before = peer.cpu_seconds()
                    times = await load(peer.url, mode, options)
                    cpu = (peer.cpu_seconds() - before) * 1000 / options.requests
                    if index:
                        peer.cpu_ms.setdefault(mode, []).append(cpu)
                        peer.ttft_ms.setdefault(mode, []).extend(times)
                    bar.update()
    for peer in peers:
        if peer.service is not None and peer.service.process is not None:
            peer.rss_mb = psutil.Process(peer.service.process.pid).memory_info().rss / 2**20


async def run(options: argparse.Namespace) -> list[Peer]:
    """Start all, measure, and end them whatever happens."""
    ports = range(options.port, options.port + 1 + len(options.gateways))
    for port in ports:
        check_port(port, "--port")
    folder: Path = options.log_folder
    upstream = Service("benchmark-upstream", ports[0], folder)
    services = [upstream]
    peers = [Peer(DIRECT, upstream.url)]
    missing = []
    try:
        module = [sys.executable, "-m", "benchmarks.gateway.upstream", str(ports[0])]
        await upstream.start([*module, str(options.tokens), str(options.pause_ms)], {})
        await upstream.ready("/health")
        for name, port in zip(options.gateways, ports[1:], strict=True):
            found = command(name, upstream.url, port, folder, options.vllm_router)
            if found is None:
                missing.append(Peer(name, "", note="not installed"))
                continue
            service = Service(f"benchmark-{name}", port, folder)
            services.append(service)
            await service.start(found[0], {})
            await service.ready(found[1])
            peers.append(Peer(name, service.url, service))
        await measure(peers, options)
        return [*peers, *missing]
    finally:
        await asyncio.gather(*(service.stop() for service in services))


def results(peers: Sequence[Peer]) -> list[dict[str, Any]]:
    """One row a gateway; CPU as median and range over rounds, ratios to the row of ours."""
    direct = peers[0].ttft_ms
    ours = next((p for p in peers if p.name == OURS), None)
    rows = []
    for peer in peers:
        row: dict[str, Any] = {"gateway": peer.name, "note": peer.note}
        for mode in MODES:
            if peer.service is not None:
                cpu = peer.cpu_ms[mode]
                row[f"{mode}_cpu_ms"] = float(np.median(cpu))
                row[f"{mode}_cpu_ms_min"], row[f"{mode}_cpu_ms_max"] = min(cpu), max(cpu)
                if ours is not None:
                    # Linux counts CPU time in 10 ms: a short round may have none.
                    pairs = zip(cpu, ours.cpu_ms[mode], strict=True)
                    ratios = [a / b for a, b in pairs if b > 0]
                    row[f"{mode}_cpu_ratio"] = float(np.median(ratios)) if ratios else None
            if peer.ttft_ms:
                for q in (50, 99):
                    here = float(np.percentile(peer.ttft_ms[mode], q))
                    row[f"{mode}_ttft_ms_p{q}"] = here
                    row[f"{mode}_ttft_added_ms_p{q}"] = here - np.percentile(direct[mode], q)
        row["rss_mb"] = peer.rss_mb
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """For people."""
    columns = {
        "stream_cpu_ms": "CPU ms, streamed",
        "stream_cpu_ratio": "x ours",
        "whole_cpu_ms": "CPU ms, whole",
        "whole_cpu_ratio": "x ours ",
        "spread_ttft_added_ms_p50": "added TTFT ms p50",
        "spread_ttft_added_ms_p99": "p99",
        "stream_ttft_added_ms_p50": "in a burst p50",
        "stream_ttft_added_ms_p99": "p99 ",
        "rss_mb": "MB",
    }
    frame = pd.DataFrame(rows).reindex(columns=["gateway", *columns, "note"])
    return frame.rename(columns=columns).to_string(index=False, na_rep="", float_format="%.2f")


def described(options: argparse.Namespace) -> dict[str, Any]:
    """What the run was made on and with."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.cpu_model(),
        "cores": machine.cores(),
        "commit": machine.commit(),
        "python": sys.version.split()[0],
        **{name: machine.package(name) for name in ("uvicorn", "fastapi", "aiohttp", "httpx")},
        "vllm_router": router_version(options.vllm_router),
        "load_average": options.load_average,
        "tokens": options.tokens,
        "pause_ms": options.pause_ms,
        "concurrency": options.concurrency,
        "requests": options.requests,
        "rounds": options.rounds,
    }


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser, add = command_line("benchmarks.gateway", __doc__)
    add("--gateways", "which, besides the model server itself", nargs="+", choices=NAMES)
    parser.set_defaults(gateways=NAMES)
    add("--requests", "in each round", type=positive, default=200)
    add("--rounds", "of each mode, after one that is not counted", type=positive, default=5)
    add("--concurrency", "requests at a time", type=positive, default=16)
    add("--tokens", "events of a streamed answer", type=positive, default=64)
    add("--pause-ms", "between two events, in ms", type=float, default=5.0)
    add("--port", "the first of a row of free ports", type=positive, default=18100)
    add("--vllm-router", "the command; none: not measured", type=Path, default=find_router())
    add("--csv", "rows are added to it", type=Path, default=CSV)
    add("--log-folder", "where the processes' logs go", type=Path, default=Path(".run"))
    parser.add_argument("--no-save", action="store_true", help="write no CSV")
    return parser.parse_args(arguments)


def main() -> None:
    """Command line: the table, and as last line one JSON object."""
    options = parse()
    options.load_average = round(os.getloadavg()[0], 2)  # others' work, before this begins
    options.log_folder.mkdir(parents=True, exist_ok=True)
    try:
        rows = results(uvloop.run(run(options)))
    except LaunchError as error:
        print(f"benchmarks.gateway: {error}", file=sys.stderr)
        sys.exit(error.code)
    except KeyboardInterrupt:
        print("benchmarks.gateway: interrupted; all processes are stopped", file=sys.stderr)
        sys.exit(130)
    about = described(options)
    if not options.no_save:
        append_csv(options.csv, about, rows)
    print(table(rows))
    print(json.dumps({**about, "rows": rows}))


if __name__ == "__main__":
    main()
