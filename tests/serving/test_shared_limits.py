"""Limits that gateways share through a real Redis (or Valkey), from several real processes."""

import asyncio
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml

from attnserve.errors import UserError
from serving.auth import digest, new_key
from serving.config import Config, KeyEntry
from serving.openai.errors import ApiError
from serving.rate_limit import Account
from serving.shared_limits import LEASE_SECONDS, SharedAccount, SharedLimits
from serving.state import GatewayState
from tests.servers import Server, free_port
from tests.serving.helpers import (
    HttpAnswer,
    ask,
    configured,
    error_of,
    leave,
    open_request,
    running,
)
from tests.serving.standin import StandIn, standin, wait_for

pytest.importorskip("redis", reason="the Python package redis is not installed")
PROGRAM = shutil.which("redis-server") or shutil.which("valkey-server")
pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(
        PROGRAM is None, reason="neither redis-server nor valkey-server is installed"
    ),
]

BODY = {"model": "m", "prompt": "x" * 40, "max_tokens": 10}  # reserves 20 tokens, uses 17
ALICE, BOB = new_key(), new_key()


@contextmanager
def redis_server(port: int) -> Iterator[subprocess.Popen[bytes]]:
    """Run a Redis that keeps nothing on disk."""
    command = [PROGRAM or "", "--port", str(port), "--bind", "127.0.0.1", "--save", ""]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    try:
        client = SharedLimits(f"redis://127.0.0.1:{port}")
        wait_for(lambda: asyncio.run(answers(client)), "Redis answers")
        yield process
    finally:
        process.kill()
        process.wait()


async def answers(client: SharedLimits) -> bool:
    try:
        return bool(await client._redis.ping())
    except client.errors:
        return False
    finally:
        await client._redis.aclose()


@pytest.fixture(scope="module")
def redis() -> Iterator[str]:
    """Yield the address of one."""
    port = free_port()
    with redis_server(port):
        yield f"redis://127.0.0.1:{port}"


def settings(upstream: StandIn, redis: str, **limits: Any) -> dict[str, Any]:
    """Return a configuration in which a new key has these limits; BOB has none."""
    global ALICE
    ALICE = new_key()
    prices = {"prompt_price": 1000, "completion_price": 1000}
    keys = [{"name": "alice", "sha256": digest(ALICE), **limits}]
    return {
        "models": [{"name": "m", "replicas": [upstream.url], **prices}],
        "keys": [*keys, {"name": "bob", "sha256": digest(BOB)}],
        "redis": redis,
    }


@contextmanager
def two_gateways(
    folder: Path, config: dict[str, Any], workers: int = 1
) -> Iterator[tuple[Server, Server]]:
    for name in "ab":
        (folder / name).mkdir()
    env = {"GATEWAY_WORKERS": str(workers)}
    with (
        configured(folder / "a", config, **env) as a,
        configured(folder / "b", config, **env) as b,
    ):
        yield a, b


def complete(gateway: Any, key: str | None = None, **fields: Any) -> HttpAnswer:
    bearer = f"Bearer {key or ALICE}"
    body = {**BODY, **fields}
    return ask(gateway.url, "POST", "/v1/completions", body, authorization=bearer)


@pytest.mark.parametrize(
    ("limits", "good"),
    [
        ({"requests_per_minute": 3}, 3),
        ({"tokens_per_minute": 60}, 3),
        ({"tokens_per_day": 60}, 3),  # 20 are reserved, 17 used
        ({"cost_per_day": 0.06}, 3),
        ({"tokens_per_day": 90, "requests_per_minute": 100}, 5),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
@pytest.mark.parametrize("stream", [False, True])
def test_two_gateways_keep_one_budget(
    redis: str, limits: dict[str, Any], good: int, stream: bool
) -> None:
    with standin() as upstream:
        config = settings(upstream, redis, **limits)
        with running(**config) as a, running(**config) as b:
            answers = []
            for gateway in (a, b, a, b, a, b)[: good + 1]:
                answers.append(complete(gateway, stream=stream))
                for each in (a, b):
                    wait_for(lambda: not settling(each), "it is settled")  # noqa: B023
            assert [answer.status for answer in answers] == [200] * good + [429]
            assert error_of(answers[-1])["code"] in ("rate_limit_exceeded", "insufficient_quota")
            name = "requests" if "requests_per_minute" in limits else "tokens"
            if "cost_per_day" not in limits:
                left = [int(a.headers[f"x-ratelimit-remaining-{name}"]) for a in answers[:-1]]
                assert left == sorted(left, reverse=True)  # what the other has used counts
            assert complete(b, BOB).status == 200


def settling(gateway: Any) -> Any:
    return gateway.state.shared.running or gateway.state.shared._settling


@pytest.mark.parametrize("workers", [1, 2])
def test_a_burst_at_two_gateways(redis: str, tmp_path: Path, workers: int) -> None:
    """Of 40 requests at once, as many go through as the budget has reservations."""
    with standin() as upstream:
        upstream.before_s = 60.0
        config = settings(upstream, redis, tokens_per_day=200)
        with two_gateways(tmp_path, config, workers) as gateways:
            clients = [
                open_request(gateways[i % 2].url, BODY, authorization=f"Bearer {ALICE}")
                for i in range(40)
            ]
            wait_for(lambda: upstream.running == 10, "ten run")
            wait_for(lambda: sum(refused(g) for g in gateways) == 30, "all others are refused")
            assert upstream.started == 10
            for client in clients:
                leave(client)


def test_workers_without_redis(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Each would give away the whole budget: refused at the start, and when a limit is new."""
    with standin() as upstream:
        config = settings(upstream, "redis://x", tokens_per_day=200)
        del config["redis"]
        file = tmp_path / "limits.yaml"
        file.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-m", "serving", "--workers=2", "--config", str(file)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert ended.returncode == 2 and ended.stderr.count("\n") == 1
        assert "several workers need `redis:` for the limits of alice" in ended.stderr
        unlimited = Config.model_validate({**config, "keys": config["keys"][1:]})
        worker = GatewayState(unlimited, file, tmp_path / "0.prom")
        asyncio.run(worker.reload())
        assert "alice" in caplog.text and worker.config is unlimited


def refused(gateway: Server) -> int:
    return gateway.log().count('"status": 429')


def test_concurrency(redis: str) -> None:
    with standin() as upstream:
        upstream.before_s = 60.0
        config = settings(upstream, redis, max_concurrent=1)
        with running(**config) as a, running(**config) as b:
            first = open_request(a.url, BODY, authorization=f"Bearer {ALICE}")
            wait_for(lambda: upstream.running == 1, "it runs")
            answer = complete(b)
            assert (answer.status, error_of(answer)["type"]) == (429, "requests")
            leave(first)
            upstream.before_s = 0.0
            wait_for(lambda: complete(b).status == 200, "there is room again")


@pytest.mark.slow  # it waits for a minute
def test_killed_gateway(redis: str, tmp_path: Path) -> None:
    """Its reservation holds while it lives, longer than a lease, and is free again after it."""
    with standin() as upstream:
        upstream.before_s = 600.0
        config = settings(upstream, redis, tokens_per_day=30)
        with two_gateways(tmp_path, config) as (a, b):
            client = open_request(a.url, BODY, authorization=f"Bearer {ALICE}")
            wait_for(lambda: upstream.running == 1, "it runs")
            began = time.monotonic()
            while time.monotonic() < began + LEASE_SECONDS + 2:
                assert complete(b).status == 429
                time.sleep(1)
            os.kill(a.pid, signal.SIGKILL)
            wait_for(lambda: upstream.running == 0, "the server is freed")
            upstream.before_s = 0.0
            assert complete(b).status == 429
            wait_for(lambda: complete(b).status == 200, "the reservation has expired")
            client.close()


@pytest.mark.parametrize("setting", ["refuse", "local"])
def test_redis_is_gone_and_comes_back(
    setting: str, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    port = free_port()
    with standin() as upstream:
        config = settings(upstream, f"redis://127.0.0.1:{port}", tokens_per_day=60)
        config["redis_down"] = setting
        with running(**config) as gateway:
            statuses = [complete(gateway) for _ in range(4)]
            assert complete(gateway, BOB).status == 200  # has no limits
            if setting == "refuse":
                assert {a.status for a in statuses} == {503}
                assert error_of(statuses[0])["code"] == "limits_unavailable"
                assert statuses[0].headers["retry-after"] == "1"
            else:
                assert [a.status for a in statuses] == [200, 200, 200, 429]
            with redis_server(port) as process:
                wait_for(lambda: "Redis is back" in seen(caplog, gateway), "it is back")
                assert complete(gateway).status == 200  # Redis knows of nothing
                upstream.before_s = 60.0
                held = open_request(gateway.url, BODY, authorization=f"Bearer {ALICE}")
                wait_for(lambda: upstream.running == 1, "it runs")
                process.kill()
            leave(held)
            wait_for(lambda: caplog.text.count("Redis is gone") == 2, "it is noticed")
            upstream.before_s = 0.0
            assert complete(gateway, BOB).status == 200
        assert "Traceback" not in caplog.text


def seen(caplog: pytest.LogCaptureFixture, gateway: Any) -> str:
    complete(gateway)
    return caplog.text


def test_the_script_counts_as_a_bucket_does(redis: str) -> None:
    """At random: what Redis says is used is what the same requests use of an account of our own."""
    entry = KeyEntry(
        name="a",
        sha256=digest(new_key()),
        requests_per_minute=600,
        tokens_per_day=3000,
        cost_per_day=2.5,
        max_concurrent=12,
    )
    rng = random.Random(0)

    async def compare() -> None:
        shared = SharedLimits(redis)
        shared.start()
        own, theirs = Account(), SharedAccount(shared, entry.sha256)
        own.set(entry)
        theirs.set(entry)
        held: list[Any] = []
        outcomes = set()
        for _ in range(600):
            if held and rng.random() < 0.5:
                used = rng.randrange(150), rng.random() / 10
                mine, other = held.pop(rng.randrange(len(held)))
                own.settle(mine, *used)
                theirs.settle(other, *used)
                await asyncio.gather(*shared._settling)
            asked = rng.randrange(400), rng.random() / 4
            results: list[Any] = []
            for account in (own, theirs):
                try:
                    results.append(await account.reserve(*asked))
                except ApiError as error:
                    results.append(error.body["error"]["type"])
            assert isinstance(results[0], str) == isinstance(results[1], str)
            outcomes.add(results[0] if isinstance(results[0], str) else "good")
            if isinstance(results[0], str):
                assert results[0] == results[1]
            else:
                held.append(results)
            now = time.monotonic()
            for mine, other in zip(own.buckets, theirs.buckets, strict=True):
                assert mine.used(now) == pytest.approx(other.used(now), abs=1.0)
        assert outcomes == {"good", "requests", "tokens", "insufficient_quota"}
        await shared.close()

    asyncio.run(compare())


def test_a_settlement_whose_answer_is_lost_counts_once(redis: str) -> None:
    """It is tried again, as it may not have been there; so is one of a lease that has ended."""
    port = int(redis.rpartition(":")[2])
    deaf = False

    async def pass_on(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, there = await asyncio.open_connection("127.0.0.1", port)

        async def pipe(
            source: asyncio.StreamReader, sink: asyncio.StreamWriter, answers: bool
        ) -> None:
            while data := await source.read(65536):
                if not (answers and deaf):
                    sink.write(data)
            sink.close()

        await asyncio.gather(pipe(reader, there, False), pipe(back, writer, True))

    async def settle(lease_ended: bool) -> None:
        nonlocal deaf
        server = await asyncio.start_server(pass_on, "127.0.0.1", 0)
        shared = SharedLimits(f"redis://127.0.0.1:{server.sockets[0].getsockname()[1]}")
        direct = SharedLimits(redis)
        account = SharedAccount(shared, key := digest(new_key()))
        account.set(KeyEntry(name="a", sha256=key, tokens_per_day=1000))
        reservation = await account.reserve(100, 0.0)
        if lease_ended:
            await direct._redis.zrem(f"attnserve:{{{key}}}:running", reservation.request)
            await direct._redis.hdel(f"attnserve:{{{key}}}:held", reservation.request)
            await direct._redis.hset(f"attnserve:{{{key}}}:used", "3", 0)
        deaf = True
        account.settle(reservation, 70, 0.0)
        await asyncio.sleep(2.5)  # it has given up waiting, and waits before it tries again
        deaf = False
        await asyncio.gather(*shared._settling)
        used = await direct._redis.hget(f"attnserve:{{{key}}}:used", "3")
        assert float(used) == pytest.approx(70, abs=0.2)  # refilled a little meanwhile
        server.close()
        await direct._redis.aclose()
        await shared._redis.aclose()

    for lease_ended in (False, True):
        asyncio.run(settle(lease_ended))


def test_a_changed_address_needs_a_restart(redis: str, tmp_path: Path) -> None:
    with standin() as upstream:
        config = settings(upstream, redis)
        with configured(tmp_path, config) as gateway:
            (tmp_path / "gateway.yaml").write_text(yaml.safe_dump({**config, "redis": None}))
            wait_for(lambda: "a changed redis needs a restart" in gateway.log(), "it says so")


@pytest.mark.parametrize("url", ["redis://x?socket_timeout=SECRET", "redis://u:SECRET@x/SECRET"])
def test_no_error_repeats_the_password(url: str) -> None:
    try:
        assert "SECRET" not in repr(SharedLimits(url))
    except UserError as error:
        assert "SECRET" not in str(error)


def test_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(UserError, match="pip install 'attnserve\\[redis\\]'"):
        SharedLimits("redis://x")
