"""Real vLLM servers for benchmarks: all are up at once, and whoever is not measured is stopped
(SIGSTOP), because an idle vLLM worker polls its queue with 2-3 % of a core."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Awaitable, Coroutine, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import aiohttp
import pandas as pd

from serving.launch.process import HOST, LaunchError, Service

MODEL = "model"
ENVIRONMENT = {"VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""vLLM's default binds every server to the same cores."""

T = TypeVar("T")
S = TypeVar("S", bound="Server")


@dataclass(frozen=True)
class Answer:
    """One prompt's answer: when it was sent and when each token came, in s."""

    sent: float
    tokens: list[float]
    cached_tokens: int
    """Of the prompt; vLLM tells it for one prompt of a batch, so it is the same for all."""


class Server:
    """One `vllm serve`.

    Args:
        name: of its log.
        ckpt: the checkpoint's folder.
        arguments: of `vllm serve`.
        threads: OpenMP threads.
        log_folder: where its log goes.
    """

    def __init__(
        self, name: str, ckpt: Path, arguments: Sequence[str], threads: int, log_folder: Path
    ) -> None:
        self.name = name
        self.service = Service(f"bench-{name}", free_port(), log_folder)
        port = self.service.url.rpartition(":")[2]
        vllm = Path(sys.executable).with_name("vllm")
        self.command = [str(vllm), "serve", str(ckpt), f"--host={HOST}", f"--port={port}"]
        self.command += [f"--served-model-name={MODEL}", *arguments]
        self.environment = {"OMP_NUM_THREADS": str(threads), **ENVIRONMENT}

    async def start(self) -> None:
        """Start its process; `service.ready` waits until it answers."""
        await self.service.start(self.command, self.environment)

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


def config_of(folder: Path) -> dict[str, Any]:
    """Return a checkpoint's config.json.

    Raises:
        LaunchError: there is none, or it is no language model's.
    """
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise LaunchError(f"{folder} is not a checkpoint: {error}", 2) from None
    for name in ("num_hidden_layers", "max_position_embeddings", "vocab_size"):
        if not isinstance(config, dict) or name not in config:
            raise LaunchError(f"{folder} is not a checkpoint: config.json has no {name}", 2)
    return config


def variant_of(config: dict[str, Any]) -> str:
    """Return the name of the attention that a config.json asks for; empty if it names none."""
    entry = config.get("attention_variant") or {}
    return str(entry.get("name", "")) if isinstance(entry, dict) else ""


def free_port() -> int:
    """A TCP port that nothing listens on."""
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        port: int = probe.getsockname()[1]
        return port


async def while_alive(services: Sequence[Service], work: Awaitable[T]) -> T:
    """Do the work, unless a server ends meanwhile: then raise what that server says."""
    tasks: list[asyncio.Future[Any]] = [asyncio.ensure_future(work)]
    tasks += [asyncio.ensure_future(service.ended()) for service in services]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        result: T = next(task for task in tasks if task in done).result()
        return result
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


async def ready(server: Server) -> None:
    """Wait until a server answers, then stop it until its turn comes."""
    await server.service.ready("/health")
    server.signal(signal.SIGSTOP)


@contextlib.asynccontextmanager
async def started(
    servers: Sequence[S], start_timeout: float
) -> AsyncIterator[dict[S, LaunchError]]:
    """Start servers at once, and end them whatever happens.

    Args:
        servers: not started yet.
        start_timeout: longest start of one, in s.

    Yields:
        Why some of them do not run; the others are stopped (SIGSTOP) until their turn comes.
    """
    failed: dict[S, LaunchError] = {}

    async def start(server: S) -> None:
        print(f"starting {server.name} (log: {server.service.log_file})", flush=True)
        await server.start()
        try:
            await asyncio.wait_for(while_alive([server.service], ready(server)), start_timeout)
        except TimeoutError:
            failed[server] = LaunchError(f"{server.name} did not start in {start_timeout} s")
        except LaunchError as error:
            failed[server] = error

    try:
        await asyncio.gather(*map(start, servers))
        yield failed
    finally:
        await asyncio.gather(*(server.stop() for server in servers))


async def until_signal(work: Coroutine[Any, Any, None]) -> bool:
    """Do the work; False if SIGINT, SIGTERM or SIGHUP ended it."""
    task = asyncio.ensure_future(work)
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        await task
    except asyncio.CancelledError:
        return False
    return True


async def run(servers: Sequence[Server], work: Coroutine[Any, Any, T], start_timeout: float) -> T:
    """Start the servers, do the work, and end them whatever happens.

    Args:
        servers: not started yet.
        work: awaited once all of them answer.
        start_timeout: longest start of all, in s.

    Raises:
        LaunchError: a server does not start, or ends.
    """
    task = asyncio.current_task()
    assert task is not None
    services = [server.service for server in servers]
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, task.cancel)
    try:
        for server in servers:
            print(f"starting {server.name} (log: {server.service.log_file})", flush=True)
            await server.start()
        try:
            async with asyncio.timeout(start_timeout):
                await while_alive(services, asyncio.gather(*map(ready, servers)))
        except TimeoutError:
            raise LaunchError(f"a server did not start in {start_timeout} s") from None
        return await while_alive(services, work)
    finally:
        work.close()  # if it was never awaited
        await asyncio.gather(*(server.stop() for server in servers))


def append_csv(
    path: Path,
    about: dict[str, Any],
    rows: Sequence[dict[str, Any]],
    leave_out: Sequence[str] = (),
) -> None:
    """Add rows, each with the columns of `about` first, to a CSV file, made if missing; columns it
    does not have yet come last."""
    added = pd.DataFrame([{**about, **row} for row in rows]).drop(columns=list(leave_out))
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.exists():  # as text: what is in it stays as it is
        added = pd.concat([pd.read_csv(path, dtype=str, keep_default_na=False), added])
    partial = path.with_name(path.name + ".partial")
    added.to_csv(partial, index=False, float_format="%.6g")
    partial.replace(path)
