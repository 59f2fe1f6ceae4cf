"""Answers that clients do not read: how much of them is kept, who pays, and how they end."""

import gc
import json
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from urllib.parse import urlsplit

import pytest

from serving.auth import digest
from serving.rate_limit import Account
from serving.upstream.http import Connection
from tests.serving.helpers import Running, ask, error_of, request_lines, running
from tests.serving.standin import StandIn, standin, wait_for

KEY = "secret"
KEYS = [{"name": "a", "sha256": digest(KEY), "tokens_per_day": 100_000}]
TOKENS = 1500
STREAM = {"model": "m", "prompt": "x" * 40, "max_tokens": TOKENS, "stream": True}
WHOLE = {**STREAM, "stream": False}


@pytest.fixture(scope="module")
def upstream() -> Iterator[StandIn]:
    """Yield a server with answers of 20 MB, more than sockets' buffers take."""
    with standin() as server:
        server.text, server.padding = "x" * 20_000_000, "x" * 13_000
        yield server


@contextmanager
def unread(gateway: Running, body: dict[str, Any]) -> Iterator[socket.socket]:
    """Send a request, and read nothing of its answer."""
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", urlsplit(gateway.url).port))
        data = json.dumps(body).encode()
        lines = (
            "POST /v1/completions HTTP/1.1",
            "host: localhost",
            "content-type: application/json",
            f"authorization: Bearer {KEY}",
            f"content-length: {len(data)}",
        )
        client.sendall("\r\n".join([*lines, "", ""]).encode() + data)
        yield client


def held(gateway: Running) -> int:
    return gateway.state.unread.bytes


def cut(gateway: Running) -> float:
    return gateway.metric('attnserve_connections_cut_total{reason="unread"')


def test_whole_answers_have_a_limit_together(
    upstream: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.unread.PATIENCE_SECONDS", 3600.0)
    limits = {"max_unread_bytes": 30_000_000}
    with running(upstream.url, limits=limits) as gateway, unread(gateway, WHOLE):
        wait_for(lambda: gateway.state.in_flight == 0 and held(gateway) > 10_000_000, "it waits")
        answer = ask(gateway.url, "POST", "/v1/completions", WHOLE)
        assert (answer.status, error_of(answer)["code"]) == (503, "too_many_unread_bytes")
        assert 10_000_000 < held(gateway) < 30_000_000 and cut(gateway) == 0
        monkeypatch.setattr("serving.unread.PATIENCE_SECONDS", 0.0)
        answer = ask(gateway.url, "POST", "/v1/completions", WHOLE)
        assert answer.status == 200 and len(answer.body) > 20_000_000
        assert cut(gateway) == 1
        wait_for(lambda: held(gateway) == 0, "nothing is held any more")


def test_streams_have_a_limit_together(upstream: StandIn, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("serving.unread.PATIENCE_SECONDS", 0.0)
    limit = 2_000_000
    config = {"limits": {"max_unread_bytes": limit}}
    with running(upstream.url, **config) as gateway, ExitStack() as stack:
        for _ in range(12):
            stack.enter_context(unread(gateway, STREAM))
        wait_for(lambda: cut(gateway) >= 5, "all but what the limit has room for are cut off")
        wait_for(lambda: 0 < held(gateway) <= limit, "the limit holds")
        code = 'attnserve_errors_total{bits="8",code="client_too_slow"'
        wait_for(lambda: gateway.metric(code) == cut(gateway), "it is the clients' fault")
        stack.close()
        wait_for(lambda: gateway.state.in_flight == 0 == held(gateway), "nothing is held")


def test_drain_ends_a_client_that_does_not_read(
    upstream: StandIn, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """It is logged and settled like any other."""
    with running(upstream.url, keys=KEYS) as gateway, unread(gateway, STREAM):
        wait_for(lambda: held(gateway) > 0, "the answer waits")
        account = account_of(gateway)
        assert account.in_flight == 1
        gateway.server.should_exit = True
        gateway.thread.join(30)
        assert not gateway.thread.is_alive()
    assert account.in_flight == 0 and account.running == set()
    (line,) = request_lines(capsys)
    assert (line["code"], line["key"]) == ("shutting_down", "a")
    assert "Traceback" not in caplog.text


def test_client_that_does_not_read_pays_for_what_nobody_has_seen(upstream: StandIn) -> None:
    """vLLM goes on writing, however little is taken from it."""
    with running(upstream.url, keys=KEYS) as gateway:
        account = account_of(gateway)
        with unread(gateway, STREAM):
            wait_for(lambda: held(gateway) > 0 and waits(gateway), "its server has to wait")
        wait_for(lambda: account.in_flight == 0, "it has left")
        assert used(account) == 10 + TOKENS  # the prompt's by the guess
        assert gateway.metric("attnserve_completion_tokens_total{") < TOKENS
        with unread(gateway, {**STREAM, "max_tokens": 4}) as client:
            while b"[DONE]" not in client.recv(65536):
                pass
        wait_for(lambda: account.in_flight == 0, "it is over")
        assert used(account) == pytest.approx(10 + TOKENS + 7 + 4, abs=2)  # refilled meanwhile


def account_of(gateway: Running) -> Account:
    return gateway.state.keys.account(f"Bearer {KEY}".encode())


def used(account: Account) -> int:
    """Return how many tokens a key has used today, but for what is free again since."""
    return round(account.buckets[2].limit - account.buckets[2].level)  # type: ignore[operator]


def waits(gateway: Running) -> bool:
    """Return whether a gateway has stopped reading from a server."""
    loop = gateway.server.servers[0].get_loop()
    own = (o for o in gc.get_objects() if isinstance(o, Connection) and o.loop is loop)
    return any(connection._paused for connection in own)
