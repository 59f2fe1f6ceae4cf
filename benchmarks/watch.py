"""What a server's metrics and the system say about it while it works."""

from __future__ import annotations

import asyncio
import contextlib
import re
import signal
from collections.abc import AsyncIterator
from dataclasses import dataclass, field

import aiohttp
import psutil

from benchmarks.servers import Server

SAMPLING_SECONDS = 0.1
RUNNING, USAGE = "vllm:num_requests_running", "vllm:kv_cache_usage_perc"


@dataclass
class Watched:
    """What was seen while requests ran."""

    running: list[float] = field(default_factory=list)
    usage: list[float] = field(default_factory=list)
    """Share of the KV cache in use."""
    rss: list[int] = field(default_factory=list)
    """Resident bytes of all its processes."""


def processes(server: Server) -> list[psutil.Process]:
    """A started server's, all of them."""
    assert server.service.process is not None
    parent = psutil.Process(server.service.process.pid)
    return [parent, *parent.children(recursive=True)]


def rss(server: Server) -> int:
    """Resident bytes of all its processes; what they share is counted in each."""
    return sum(process.memory_info().rss for process in processes(server))


async def metrics(session: aiohttp.ClientSession, server: Server) -> str:
    """In Prometheus' format."""
    async with session.get(f"{server.service.url}/metrics") as answer:
        return await answer.text()


@contextlib.asynccontextmanager
async def watched(server: Server) -> AsyncIterator[Watched]:
    """Wakes a server and samples its metrics and memory while the body runs."""
    seen = Watched()

    async def watch() -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                text = await metrics(session, server)
                found = {
                    name: float(value)
                    for name, value in re.findall(r"^([\w:]+)\{.*\} (\S+)$", text, re.MULTILINE)
                    if name in (RUNNING, USAGE)
                }
                if found[RUNNING]:
                    seen.running.append(found[RUNNING])
                    seen.usage.append(found[USAGE])
                    seen.rss.append(rss(server))
                await asyncio.sleep(SAMPLING_SECONDS)

    server.signal(signal.SIGCONT)
    task = asyncio.create_task(watch())
    try:
        yield seen
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
