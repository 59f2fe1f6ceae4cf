"""The command of `benchmarks.gateway`: gateways in turn before the same model server."""

from __future__ import annotations

import asyncio
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from enum import StrEnum
from importlib.metadata import distributions
from pathlib import Path
from typing import Annotated, Any

import aiohttp
import numpy as np
import psutil
import uvloop
from tqdm import tqdm

from attnserve import machine
from attnserve.command import AsJson, main, options_of
from attnserve.files import CHECKOUT
from benchmarks import RESULTS, results
from benchmarks import options as opt
from benchmarks.servers import free_port, run
from serving.launch.process import HOST, LaunchError, Service

CSV = RESULTS / "gateway.csv"
DIRECT, OURS, WORKERS, ROUTER = "direct", "attnserve", "attnserve-2-workers", "vllm-router"
MODES = ("stream", "spread", "whole")
PROMPT = "It was the best of times, it was the worst of times. " * 4


GatewayName = StrEnum(
    "GatewayName",
    {
        "OURS": OURS,
        "WORKERS": WORKERS,
        "AIOHTTP": "naive-aiohttp",
        "HTTPX": "naive-httpx",
        "FLOOR": "floor-asgi",
        "FLOOR_WORKERS": "floor-asgi-2-workers",
        "PIPE": "floor-pipe",
        "ROUTER": ROUTER,
    },
)


@dataclass(frozen=True)
class GatewayLoad:
    """The loads."""

    requests: Annotated[int, opt.count("In each round.")] = 200
    rounds: Annotated[int, opt.count("Of each load, after one that is not counted.")] = 5
    concurrency: Annotated[int, opt.count("Requests at a time.")] = 16
    tokens: Annotated[int, opt.count("Events of a streamed answer.")] = 64
    pause_ms: Annotated[float, opt.option("Between two events, in ms.", min=0)] = 5.0


@dataclass
class Gateway:
    """One gateway (or the model server itself) and what was measured on it.

    Attributes:
        service: its process; None for the model server itself.
        cpu_ms: of a request, for each load and round.
        ttft_ms: for each load and request.
    """

    name: str
    url: str
    service: Service | None = None
    note: str = ""
    cpu_ms: dict[str, list[float]] = field(default_factory=dict)
    ttft_ms: dict[str, list[float]] = field(default_factory=dict)
    rss_mb: float | None = None

    def processes(self) -> list[psutil.Process]:
        """Return its processes."""
        if self.service is None:
            return []
        assert self.service.process is not None
        root = psutil.Process(self.service.process.pid)
        return [root, *root.children(recursive=True)]

    def cpu_seconds(self) -> float:
        """Return the CPU time of its processes' threads so far: of those that still run, from
        Linux' scheduler, as its other figures are in steps of 10 ms."""
        stats = [
            f for p in self.processes() for f in Path(f"/proc/{p.pid}/task").glob("*/schedstat")
        ]
        return sum(int(file.read_text().split()[0]) for file in stats) / 1e9


@options_of(GatewayLoad)
def gateway(
    gateways: Annotated[list[GatewayName] | None, opt.option("Which (default: all).")] = None,
    vllm_router: Annotated[
        Path | None,
        opt.folder("The command vllm-router (default: of `make conformance`, or on PATH)."),
    ] = None,
    csv: opt.Csv = CSV,
    no_save: opt.NoSave = False,
    log_folder: opt.LogFolder = Path(".run"),
    as_json: AsJson = False,
    *,
    plan: GatewayLoad,
) -> None:
    """Measure the CPU time of one request in a gateway, ours beside others.

    All gateways stand in front of the same model server, a small one that streams events at an even
    pace; the floors are Python processes that only pass bytes on: one, or two workers, with HTTP on
    both sides, and one without. In each round every gateway gets the same load in turn, and the
    order of the turn is reversed every other round; its CPU time is read before and after (user and
    system, its children's too). Added time to first token is against the same load sent straight to
    the model server ("direct"); it needs an idle machine, because the load generator and the model
    server are processes, too. Memory is what its processes keep resident after all rounds.

    Three loads, of so many clients that each send a request as soon as the last one is answered:
    `stream`, where they begin together and, answers being equally long, stay together, so that a
    gateway gets all requests in one burst; `spread`, where they begin an equal part of an answer
    apart, so that a request meets the other streams under way; and `whole`, not streamed, together.
    """  # fmt: skip
    router = vllm_router or find_router()
    chosen = [name.value for name in gateways or GatewayName]
    save = results.checked(csv, no_save)
    log_folder.mkdir(parents=True, exist_ok=True)
    about = machine.described()
    about |= {"python": sys.version.split()[0], "vllm_router": router_version(router)}
    about |= {name: machine.package(name) for name in ("uvicorn", "fastapi", "aiohttp", "httpx")}
    work = measure_all(chosen, plan, router, log_folder)
    rows = rows_of(run(work, "python -m benchmarks.gateway", uvloop.new_event_loop))
    results.report({**about, **asdict(plan)}, rows, table(rows), csv=save, as_json=as_json)


def find_router() -> Path | None:
    """Return the command vllm-router: beside this Python, where `make conformance` puts it, or on
    PATH."""
    folders = [Path(sys.executable).parent, CHECKOUT / "tests/conformance/.venv/bin"]
    found = shutil.which(ROUTER, path=os.pathsep.join([*map(str, folders), os.environ["PATH"]]))
    return None if found is None else Path(found)


def router_version(router: Path | None) -> str:
    """Return the version of the package beside the command; empty if there is none."""
    if router is None:
        return ""
    folders = [str(path) for path in router.parent.parent.glob("lib/python*/site-packages")]
    return next((found.version for found in distributions(name=ROUTER, path=folders)), "")


def command(
    name: str, upstream: str, service: Service, router: Path | None
) -> tuple[list[str], str] | None:
    """Return how to start a gateway, and the path that answers then; None: it is not installed."""
    port = str(service.port)
    if name in (OURS, WORKERS):
        file = service.log_file.with_suffix(".yaml")
        entry = {"name": "m", "variant": "softmax", "bits": 16, "replicas": [upstream]}
        file.write_text(json.dumps({"port": service.port, "models": [entry]}))  # JSON is YAML
        workers = "--workers=2" if name == WORKERS else "--workers=1"
        return [sys.executable, "-m", "serving", "--config", str(file), workers], "/metrics"
    if name == ROUTER:
        args = ["--worker-urls", upstream, "--host", HOST, "--port", port]
        args += ["--policy", "round_robin", "--prometheus-port", str(free_port())]
        return ([str(router), *args], "/health") if router else None
    peer, kind, *count = name.removesuffix("-workers").split("-")
    module = [sys.executable, "-m", f"benchmarks.gateway.{peer}", kind, upstream, port, *count]
    return module, "/openapi.json"


async def one(session: aiohttp.ClientSession, url: str, stream: bool, tokens: int) -> float:
    """Send one request; return the milliseconds to its first bytes."""
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


async def load(url: str, mode: str, plan: GatewayLoad) -> list[float]:
    """Send a load; return each request's time to the first bytes, in ms."""
    left = iter(range(plan.requests))
    found: list[float] = []
    apart = plan.tokens * plan.pause_ms / 1000 / plan.concurrency if mode == "spread" else 0.0
    timeout, connector = aiohttp.ClientTimeout(total=120), aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector, timeout=timeout) as session:

        async def client(index: int) -> None:
            await asyncio.sleep(index * apart)
            for _ in left:
                found.append(await one(session, url, mode != "whole", plan.tokens))

        await asyncio.gather(*(client(index) for index in range(plan.concurrency)))
    return found


async def measure(gateways: Sequence[Gateway], plan: GatewayLoad) -> None:
    """Run all rounds; the first is thrown away (connections, caches, compiled code)."""
    total = len(MODES) * (plan.rounds + 1) * len(gateways)
    with tqdm(total=total, unit="load", mininterval=5) as bar:
        for mode in MODES:
            for index in range(plan.rounds + 1):
                for each in gateways[:: -1 if index % 2 else 1]:
                    before = each.cpu_seconds()
                    times = await load(each.url, mode, plan)
                    cpu = (each.cpu_seconds() - before) * 1000 / plan.requests
                    if index:
                        each.cpu_ms.setdefault(mode, []).append(cpu)
                        each.ttft_ms.setdefault(mode, []).extend(times)
                    bar.update()
    for each in gateways:
        if each.service is not None:
            each.rss_mb = sum(p.memory_info().rss for p in each.processes()) / 2**20


async def measure_all(
    names: Sequence[str], plan: GatewayLoad, router: Path | None, log_folder: Path
) -> list[Gateway]:
    """Start all gateways, measure, and end them whatever happens; the model server is first."""

    def service(name: str) -> Service:
        services.append(Service(f"benchmark-{name}", free_port(), log_folder))
        return services[-1]

    services: list[Service] = []
    upstream = service("upstream")
    running, missing = [Gateway(DIRECT, upstream.url)], []
    try:
        module = [sys.executable, "-m", "benchmarks.gateway.upstream"]
        arguments = map(str, (upstream.port, plan.tokens, plan.pause_ms))
        await upstream.start([*module, *arguments], {})
        await upstream.ready("/health")
        for name in names:
            own = service(name)
            found = command(name, upstream.url, own, router)
            if found is None:
                missing.append(Gateway(name, "", note="not installed"))
                continue
            await own.start(found[0], {})
            await own.ready(found[1])
            running.append(Gateway(name, own.url, own))
        await measure(running, plan)
        return [*running, *missing]
    finally:
        await asyncio.gather(*(service.stop() for service in services))


def rows_of(gateways: Sequence[Gateway]) -> list[results.Row]:
    """Return one row a gateway; CPU as median and range over rounds, ratios to the row of ours."""
    direct = gateways[0].ttft_ms
    ours = next((each for each in gateways if each.name == OURS), None)
    rows = []
    for each in gateways:
        row: results.Row = {"gateway": each.name, "note": each.note}
        for mode in MODES:
            if each.service is not None:
                cpu = each.cpu_ms[mode]
                row[f"{mode}_cpu_ms"] = float(np.median(cpu))
                row[f"{mode}_cpu_ms_min"], row[f"{mode}_cpu_ms_max"] = min(cpu), max(cpu)
                if ours is not None:
                    pairs = zip(cpu, ours.cpu_ms[mode], strict=True)
                    row[f"{mode}_cpu_ratio"] = float(np.median([a / b for a, b in pairs]))
            if each.ttft_ms:
                for q in (50, 99):
                    here = float(np.percentile(each.ttft_ms[mode], q))
                    row[f"{mode}_ttft_ms_p{q}"] = here
                    row[f"{mode}_ttft_added_ms_p{q}"] = here - np.percentile(direct[mode], q)
        row["rss_mb"] = each.rss_mb
        rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return the most important columns."""
    import pandas as pd

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


if __name__ == "__main__":
    main(gateway, "python -m benchmarks.gateway")
