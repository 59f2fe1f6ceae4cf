"""What a server's metrics and the system say about it while it works."""

from __future__ import annotations

import asyncio
import re
import signal
from collections.abc import Coroutine
from dataclasses import dataclass, field
from typing import Any, TypeVar

import aiohttp
import psutil

from benchmarks.servers import Server
from serving.launch.process import LaunchError

SAMPLING_SECONDS = 0.1
RUNNING, USAGE = "vllm:num_requests_running", "vllm:kv_cache_usage_perc"

T = TypeVar("T")


@dataclass
class Watched:
    """What was seen while requests ran.

    Attributes:
        running: requests in flight.
        usage: share of the KV cache in use.
        rss: resident bytes of all processes.
    """

    running: list[float] = field(default_factory=list)
    usage: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)


def processes(server: Server) -> list[psutil.Process]:
    """Return those of a started server, all of them."""
    assert server.service.process is not None
    parent = psutil.Process(server.service.process.pid)
    return [parent, *parent.children(recursive=True)]


def rss(server: Server) -> int:
    """Return the resident bytes of all its processes; what they share is counted in each."""
    return sum(process.memory_info().rss for process in processes(server))


async def metrics(session: aiohttp.ClientSession, server: Server) -> str:
    """Return a server's metrics, in Prometheus' format."""
    async with session.get(f"{server.service.url}/metrics") as answer:
        return await answer.text()


async def watch(server: Server, work: Coroutine[Any, Any, T]) -> tuple[T, Watched]:
    """Do the work on a server; return its result and what was seen meanwhile."""
    seen = Watched()

    async def sample() -> None:
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
    task = asyncio.create_task(sample())
    try:
        result = await work
    finally:
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
    if not seen.running:
        raise LaunchError("the requests were over before they were seen: give more --new-tokens")
    return result, seen
