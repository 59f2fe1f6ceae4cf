"""A client that leaves frees its request upstream, always: counted at a real HTTP server.

tests/serving/test_disconnect.py has the same against a real vLLM.
"""

import contextlib
import http.client
import json
import socket
import time
from collections.abc import Callable
from urllib.parse import urlsplit

import pytest

from tests.serving.helpers import ask, leave, open_request, running
from tests.serving.standin import StandIn, standin, wait_for, wait_for_value

BODY = {"model": "m", "prompt": "x" * 50, "max_tokens": 1000}
Leaving = Callable[[str, StandIn], None]


def mid_stream(url: str, upstream: StandIn) -> None:
    upstream.before_s, upstream.between_s = 0.0, 0.05
    connection = open_request(url, {**BODY, "stream": True})
    assert connection.getresponse().readline().startswith(b"data: ")
    leave(connection)


def before_first_token(url: str, upstream: StandIn) -> None:
    upstream.before_s = 60.0
    wait_until_running(open_request(url, {**BODY, "stream": True}), upstream)


def whole(url: str, upstream: StandIn) -> None:
    upstream.before_s = 60.0
    wait_until_running(open_request(url, BODY), upstream)


def wait_until_running(connection: http.client.HTTPConnection, upstream: StandIn) -> None:
    """Leave as soon as the request has reached the upstream."""
    wait_for(lambda: upstream.running == 1, "the request runs")
    leave(connection)


WAYS: list[Leaving] = [mid_stream, before_first_token, whole]


def check(way: Leaving, times: int) -> None:
    """So many clients leave, one after the other; each must free the upstream by itself."""
    with standin() as upstream, running(upstream.url) as gateway:
        for i in range(1, times + 1):
            way(gateway.url, upstream)
            wait_for_value(lambda: upstream.aborted, i, f"abort {i}")
            assert upstream.running == 0
        assert (upstream.started, upstream.finished) == (times, 0)
        stage = f'attnserve_aborts_total{{bits="8",model="m",stage="{way.__name__}"'
        wait_for(lambda: gateway.metric(stage) == times, "the gateway counts them")
        assert gateway.metric("attnserve_replica_in_flight{") == 0
        assert gateway.metric("attnserve_requests_in_flight") == 1  # this one
        upstream.before_s = upstream.between_s = 0.0
        assert ask(gateway.url, "POST", "/v1/completions", {**BODY, "max_tokens": 1}).status == 200


@pytest.mark.parametrize("way", WAYS)
def test_each_way_frees_the_upstream(way: Leaving) -> None:
    check(way, 5)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
def test_a_hundred_of_each_way_free_the_upstream(way: Leaving) -> None:
    check(way, 100)


def test_all_at_once() -> None:
    with standin() as upstream, running(upstream.url) as gateway:
        upstream.before_s = 60.0
        clients = [open_request(gateway.url, {**BODY, "stream": i % 2 == 0}) for i in range(30)]
        wait_for(lambda: upstream.running == 30, "all run")
        for client in clients:
            leave(client)
        wait_for(lambda: upstream.aborted == 30, "all are aborted")


def test_while_it_waits_for_room() -> None:
    limits = {"max_concurrent_per_replica": 1}
    with standin() as upstream, running(upstream.url, limits=limits) as gateway:
        upstream.before_s = 60.0
        first = open_request(gateway.url, BODY)
        wait_for(lambda: upstream.running == 1, "the first runs")
        second = open_request(gateway.url, BODY)
        wait_for(lambda: gateway.metric("attnserve_queue_length{") == 1, "the second waits")
        leave(second)
        wait_for(lambda: gateway.metric("attnserve_queue_length{") == 0, "it has left")
        third = open_request(gateway.url, {**BODY, "max_tokens": 1})
        wait_for(lambda: gateway.metric("attnserve_queue_length{") == 1, "the third waits")
        upstream.before_s = 0.0
        leave(first)
        assert third.getresponse().status == 200  # not held up by the one that left
        assert upstream.started == 2


def raw(prompt: str) -> bytes:
    """Return a request as it goes over the wire."""
    body = json.dumps({"model": "m", "prompt": prompt, "max_tokens": 2}).encode()
    head = b"POST /v1/completions HTTP/1.1\r\nhost: localhost\r\ncontent-length: %d\r\n"
    head += b"content-type: application/json\r\n\r\n"
    return head % len(body) + body


def connect(url: str) -> socket.socket:
    return socket.create_connection(("127.0.0.1", urlsplit(url).port or 0), timeout=20)


def test_the_next_request_of_a_kept_connection() -> None:
    with standin() as upstream, running(upstream.url) as gateway, connect(gateway.url) as client:
        client.sendall(raw("first"))
        assert client.recv(65536).startswith(b"HTTP/1.1 200")
        wait_for(lambda: upstream.finished == 1, "it is answered")
        upstream.before_s = 60.0
        client.sendall(raw("second"))
        wait_for(lambda: upstream.running == 1, "it runs")
        client.close()
        wait_for(lambda: upstream.aborted == 1, "it is aborted")


@pytest.mark.parametrize("together", [True, False])
def test_pipelined_requests(together: bool) -> None:
    """The one that runs is aborted, and those that wait for it never begin."""
    with standin() as upstream, running(upstream.url) as gateway, connect(gateway.url) as client:
        upstream.before_s = 60.0
        client.sendall(raw("first") * (2 if together else 1))
        wait_for(lambda: upstream.running == 1, "the first runs")
        client.sendall(raw("later"))
        time.sleep(0.1)  # for the gateway to read it
        client.close()
        wait_for(lambda: upstream.aborted == 1, "the first is aborted")
        wait_for(lambda: gateway.metric("attnserve_requests_in_flight") == 1, "only this one")
        assert upstream.started == 1


def test_pipelined_requests_are_answered_in_order() -> None:
    with standin() as upstream, running(upstream.url) as gateway, connect(gateway.url) as client:
        client.sendall(b"".join(raw(f"{i}") for i in range(10)))
        got = b""
        while got.count(b"HTTP/1.1 200") < 10 or not got.endswith(b"}"):
            got += client.recv(65536)
        assert [s["body"]["prompt"] for s in upstream.seen] == [f"{i}" for i in range(10)]


def test_large_pipelined_requests() -> None:
    """What waits is not kept beyond a limit: the client sends it again."""
    with standin() as upstream, running(upstream.url) as gateway, connect(gateway.url) as client:
        upstream.before_s = 0.5
        client.sendall(raw("first") + raw("x" * 30_000) * 3)
        got = b""
        while piece := client.recv(65536):
            got += piece
        assert got.count(b"HTTP/1.1 200") == 1 and b"\r\nconnection: close\r\n" in got
        assert [s["body"]["prompt"] for s in upstream.seen] == ["first"]


def test_more_pipelined_requests_than_one_client_needs() -> None:
    with standin() as upstream, running(upstream.url) as gateway, connect(gateway.url) as client:
        upstream.before_s = 60.0
        client.sendall(b"".join(raw("x") for _ in range(30)))
        with contextlib.suppress(ConnectionResetError):
            assert client.recv(1) == b""
        wait_for(lambda: gateway.metric("attnserve_requests_in_flight") == 1, "only this one")
        wait_for(lambda: upstream.started == upstream.aborted, "none runs upstream")
