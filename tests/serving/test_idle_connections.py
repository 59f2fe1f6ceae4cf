"""Connections that the model server closes after 5 s of idling, just when the next request comes.

A pooled client without care loses some percent of the requests then ("Server disconnected").
"""

import asyncio
import random
import sys
from collections import Counter
from pathlib import Path

import aiohttp
import pytest

from tests.servers import end_group, free_port, spawn, wait_until_healthy
from tests.serving.helpers import configured

CLIENTS, WAVES = 500, 20
"""All clients ask at once, so that the gateway needs a connection for each; then all idle."""


async def ask_in_waves(url: str) -> Counter[int | str]:
    """Statuses of CLIENTS x WAVES requests, with 4.8 to 5.2 s between two waves."""
    found: Counter[int | str] = Counter()
    body = {"model": "m", "prompt": "x", "max_tokens": 1}
    chance = random.Random(0)
    connector = aiohttp.TCPConnector(limit=0)
    async with aiohttp.ClientSession(connector=connector) as session:

        async def ask() -> None:
            try:
                async with session.post(f"{url}/v1/completions", json=body) as answer:
                    await answer.read()
                    found[answer.status] += 1
            except aiohttp.ClientError as error:
                found[type(error).__name__] += 1

        for _ in range(WAVES):
            await asyncio.gather(*(ask() for _ in range(CLIENTS)))
            await asyncio.sleep(chance.uniform(4.8, 5.2))
    return found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("idle", "lost"),
    [(4.0, 0), (60.0, CLIENTS * WAVES // 100)],
    ids=["default", "left to the server"],
)
def test_ten_thousand_requests_after_idling(tmp_path: Path, idle: float, lost: int) -> None:
    """With the default, connections are given up before the server does. Kept longer, the server
    closes them under a request now and then, and a fresh one takes its place, but for those that a
    reset ended: the server may have read them, and they are not sent twice."""
    port = free_port()
    log = tmp_path / "upstream.log"
    process = spawn([sys.executable, "-m", "tests.serving.standin", str(port)], log)
    url = f"http://127.0.0.1:{port}"
    config = {
        "models": [{"name": "*", "replicas": [url]}],
        "timeouts": {"idle": idle},
        "logging": {"requests": False},
    }
    try:
        wait_until_healthy(url, process, log)
        with configured(tmp_path, config) as gateway:
            found = asyncio.run(ask_in_waves(gateway.url))
        assert found.total() == CLIENTS * WAVES
        assert found[502] <= lost
        assert found.keys() <= {200, 502}
    finally:
        end_group(process)
