"""Model servers that are killed under load and come back: real processes, SIGKILL.

No request fails whose answer had not begun; a stream that had ends with an error event.
"""

import asyncio
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack
from pathlib import Path

import aiohttp
import pytest

from tests.servers import end_group, free_port, spawn, wait_until_healthy
from tests.serving.helpers import configured

CLIENTS = 32
TOKENS = 20


class ReplicaProcess:
    """A stand-in in a process of its own: 0.2 s to the first token, 0.02 s between two."""

    def __init__(self, folder: Path) -> None:
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = folder / f"replica-{self.port}.log"

    def start(self) -> None:
        """Start it, and return when it answers."""
        module = [sys.executable, "-m", "tests.serving.standin", str(self.port), "0.2", "0.02"]
        self.process: subprocess.Popen[bytes] = spawn(module, self.log)
        wait_until_healthy(self.url, self.process, self.log)

    def kill(self) -> None:
        """As the kernel does when memory is short."""
        os.kill(self.process.pid, signal.SIGKILL)
        self.process.wait()

    def end(self) -> None:
        """For good."""
        end_group(self.process)


async def load(url: str, over: asyncio.Event) -> Counter[str]:
    """Count what becomes of requests, half of them streamed, from CLIENTS at a time."""
    found: Counter[str] = Counter()

    async def one(session: aiohttp.ClientSession, stream: bool) -> str:
        body = {"model": "m", "prompt": "x", "max_tokens": TOKENS, "stream": stream}
        async with session.post(f"{url}/v1/completions", json=body) as answer:
            text = await answer.text()
        if answer.status != 200:
            return f"{answer.status} {text}"
        if not stream:
            return (
                "whole" if len(json.loads(text)["choices"][0]["text"].split()) == TOKENS else text
            )
        events = [event.removeprefix("data: ") for event in text.strip().split("\n\n")]
        if events[-1] == "[DONE]":
            return "streamed" if len(events) == TOKENS + 1 else text
        begun = json.loads(events[0]).get("choices")
        code = json.loads(events[-1]).get("error", {}).get("code")
        return "broke off" if begun and code == "upstream_broken" else text

    async def client(session: aiohttp.ClientSession, index: int) -> None:
        turn = index
        while not over.is_set():
            try:
                found[await one(session, turn % 2 == 0)] += 1
            except aiohttp.ClientError as error:
                found[repr(error)] += 1
            turn += 1

    timeout = aiohttp.ClientTimeout(total=120)
    async with aiohttp.ClientSession(timeout=timeout) as session:
        await asyncio.gather(*(client(session, i) for i in range(CLIENTS)))
    return found


def answered_since(log: Path, offset: int) -> Counter[str]:
    """Return requests that each replica has answered, by the gateway's log from a place in it."""
    found: Counter[str] = Counter()
    for line in log.read_bytes()[offset:].decode().splitlines():
        fields = json.loads(line)
        if fields.get("status") == 200:
            found[fields["replica"]] += 1
    return found


@pytest.mark.slow
def test_kill_and_restart_under_load(tmp_path: Path) -> None:
    """Every replica is killed twice, one at a time, and each time gets traffic again."""
    with ExitStack() as stack:
        replicas = [ReplicaProcess(tmp_path) for _ in range(3)]
        for replica in replicas:
            replica.start()
            stack.callback(replica.end)
        models = [{"name": "m", "replicas": [r.url for r in replicas]}]
        breaker = {"open_seconds": 1.0}
        gateway = stack.enter_context(configured(tmp_path, {"models": models, "breaker": breaker}))

        async def run() -> Counter[str]:
            over = asyncio.Event()
            running = asyncio.create_task(load(gateway.url, over))
            for replica in replicas * 2:
                await asyncio.sleep(2)
                await asyncio.to_thread(replica.kill)
                await asyncio.sleep(2)
                await asyncio.to_thread(replica.start)
                began = gateway.log_file.stat().st_size
                await asyncio.sleep(5)
                assert answered_since(gateway.log_file, began)[replica.url] > 0
            over.set()
            return await running

        found = asyncio.run(run())
    assert found.keys() <= {"whole", "streamed", "broke off"}, found
    assert min(found["whole"], found["streamed"], found["broke off"]) > 0, found
