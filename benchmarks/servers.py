"""Real vLLM servers for benchmarks: all are up at once, and whoever is not measured is stopped
(SIGSTOP), because an idle vLLM worker polls its queue with 2-3 % of a core."""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import signal
import socket
import sys
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import psutil

from attnserve.command import fail
from benchmarks.options import ServerOptions
from serving.launch.process import HOST, LaunchError, Service

MODEL = "model"
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""vLLM's default binds every server to the same cores."""

SAMPLING_SECONDS = 0.1
RUNNING, USAGE = "vllm:num_requests_running", "vllm:kv_cache_usage_perc"

T = TypeVar("T")


class Server:
    """One `vllm serve` of a checkpoint, with the options of all servers and arguments of its own;
    its log has its name."""

    def __init__(self, name: str, ckpt: Path, options: ServerOptions, *arguments: str) -> None:
        self.name, self.ckpt, self.start_timeout = name, ckpt, options.start_timeout
        self.service = Service(f"bench-{name.replace(' ', '-')}", free_port(), options.log_folder)
        vllm = Path(sys.executable).with_name("vllm")
        self.command = [
            str(vllm),
            "serve",
            str(ckpt),
            f"--host={HOST}",
            f"--port={self.service.port}",
        ]
        self.command += [f"--served-model-name={MODEL}", *arguments]
        self.command += [f"--kv-cache-memory-bytes={options.kv_cache_memory_bytes}"]
        self.command += ["--enforce-eager"] * options.enforce_eager
        self.environment = {"OMP_NUM_THREADS": str(options.threads), **ENVIRONMENT}

    async def start(self) -> None:
        """Start it, wait until it answers, and stop it until its turn comes."""
        log = self.service.log_file
        print(f"starting {self.name} (log: {log})", file=sys.stderr, flush=True)
        await self.service.start(self.command, self.environment)
        try:
            async with asyncio.timeout(self.start_timeout):
                await while_alive(self.service, self.service.ready("/health"))
        except TimeoutError:
            raise LaunchError(f"{self.name} did not start in {self.start_timeout} s") from None
        self.signal(signal.SIGSTOP)

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to its processes, all of them, if it has any."""
        process = self.service.process
        if process is not None and process.returncode is None:
            os.killpg(process.pid, number)

    def processes(self) -> list[psutil.Process]:
        """Return its processes, all of them, once it is started."""
        assert self.service.process is not None
        parent = psutil.Process(self.service.process.pid)
        return [parent, *parent.children(recursive=True)]

    def rss(self) -> int:
        """Return the resident bytes of all its processes; what they share is counted in each."""
        return sum(process.memory_info().rss for process in self.processes())

    async def metrics(self, session: aiohttp.ClientSession) -> str:
        """Return its metrics, in Prometheus' format."""
        async with session.get(f"{self.service.url}/metrics") as answer:
            return await answer.text()

    async def stop(self) -> None:
        """End it, stopped or not, and leave nothing of it running."""
        self.signal(signal.SIGCONT)
        await self.service.stop()

    async def generate(self, prompts: list[list[int]], n: int) -> None:
        """Send all prompts as one request, so that they reach the scheduler together, and wait for
        their greedy answers of `n` tokens. Whatever happens, its processes are stopped then.
        """
        body = {"model": MODEL, "prompt": prompts, "max_tokens": n, "temperature": 0.0}
        body |= {"ignore_eos": True}
        url = f"{self.service.url}/v1/completions"
        timeout = aiohttp.ClientTimeout(total=None)
        self.signal(signal.SIGCONT)
        try:
            async with aiohttp.request("POST", url, json=body, timeout=timeout) as answer:
                if answer.status != 200:
                    raise self.service.failed(f"answered {answer.status}")
                tokens = (await answer.json())["usage"]["completion_tokens"]
        except aiohttp.ClientError as error:
            raise self.service.failed(f"broke the connection ({error})") from error
        finally:
            self.signal(signal.SIGSTOP)
        if tokens != n * len(prompts):
            raise self.service.failed(f"did not answer each prompt with {n} tokens")


def free_port() -> int:
    """Return a TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


async def while_alive(service: Service, work: Awaitable[T]) -> T:
    """Do the work, unless the server ends meanwhile."""
    tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(work)]
    tasks.append(asyncio.ensure_future(service.ended()))
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        result: T = next(task for task in tasks if task.done()).result()
        return result
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


@contextlib.asynccontextmanager
async def started(servers: Sequence[Server]) -> AsyncIterator[dict[Server, LaunchError]]:
    """Start servers at once, and end them whatever happens.

    Yields:
        Why some of them do not run; the others are stopped (SIGSTOP) until their turn comes.
    """
    failed: dict[Server, LaunchError] = {}

    async def start(server: Server) -> None:
        try:
            await server.start()
        except LaunchError as error:
            failed[server] = error

    try:
        await asyncio.gather(*map(start, servers))
        yield failed
    finally:
        await asyncio.gather(*(server.stop() for server in servers))


@dataclass
class Watched:
    """What was seen while requests ran: how many, the share of the KV cache in use, and resident
    bytes of all processes."""

    running: list[float] = field(default_factory=list)
    usage: list[float] = field(default_factory=list)
    rss: list[int] = field(default_factory=list)


async def watch(server: Server, work: Coroutine[Any, Any, T]) -> tuple[T, Watched]:
    """Do the work on a server; return its result and what was seen meanwhile."""
    seen = Watched()

    async def sample() -> None:
        async with aiohttp.ClientSession() as session:
            while True:
                text = await server.metrics(session)
                found = {
                    name: float(value)
                    for name, value in re.findall(r"^([\w:]+)\{.*\} (\S+)$", text, re.MULTILINE)
                    if name in (RUNNING, USAGE)
                }
                if found[RUNNING]:
                    seen.running.append(found[RUNNING])
                    seen.usage.append(found[USAGE])
                    seen.rss.append(server.rss())
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


def run(
    work: Coroutine[Any, Any, T],
    name: str,
    loop_factory: Callable[[], asyncio.AbstractEventLoop] | None = None,
) -> T:
    """Run a benchmark's work to its end, which ends its servers when it is cancelled; SIGTERM and
    SIGHUP are Ctrl-C. Where a server does not start, or ends, so does this process, with its last
    words."""

    async def main() -> T:
        task = asyncio.current_task()
        assert task is not None
        for number in (signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, task.cancel)
        return await work

    try:
        with asyncio.Runner(loop_factory=loop_factory) as runner:
            return runner.run(main())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    except LaunchError as error:
        fail(name, str(error), error.code)


def interrupted(work: Coroutine[Any, Any, object], name: str) -> bool:
    """Run a benchmark's work (`run`) and return whether a signal ended it, in which case what was
    measured until then is still to be saved."""
    try:
        run(work, name)
    except KeyboardInterrupt:
        print(f"{name}: interrupted; the servers are stopped", file=sys.stderr)
        return True
    return False
