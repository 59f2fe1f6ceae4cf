"""A client that leaves frees its request upstream: mid-stream, before the first token, unstreamed.

The upstream has one seat, and a request here would keep it for a minute or more. vLLM counts the
requests that it answers to their ends: one that ran and is not among them was aborted.
"""

import http.client
import json
import socket
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from tests.servers import Server
from tests.serving.conftest import CONTEXT
from tests.serving.helpers import MODEL, completion, leave, metric
from tests.serving.standin import wait_for, wait_for_value

PATIENCE = 100.0
"""Seconds, for what takes a fraction of one: while vLLM decodes, two of its processes call
sched_yield without end, and some kernels then keep others from their core (docs/LOG.md)."""

LONG = CONTEXT - 1000
"""Tokens; more than a minute on two cores."""


def connect(url: str, stream: bool) -> http.client.HTTPConnection:
    """Send a request for LONG tokens and do not wait for an answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=PATIENCE)
    body = {"model": MODEL, "prompt": "x", "max_tokens": LONG, "ignore_eos": True, "stream": stream}
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


def upstream_gauge(upstream: Server, name: str) -> float:
    """One of vLLM's own gauges."""
    return metric(upstream.url, f"vllm:{name}{{")


@pytest.fixture
def all_aborted(upstream: Server) -> Iterator[None]:
    """After the test, nothing that it asked for runs, waits or was answered to its end."""

    def ended() -> float:
        return metric(upstream.url, "vllm:request_success_total{", 'finished_reason="length"')

    def left() -> float:
        gauges = "num_requests_running", "num_requests_waiting"
        return sum(upstream_gauge(upstream, name) for name in gauges)

    before = ended()
    yield
    wait_for_value(left, 0, "nothing is left", PATIENCE)
    completion(upstream.url, timeout=PATIENCE, max_tokens=1, ignore_eos=True)
    wait_for(lambda: ended() > before, "it is counted", PATIENCE)
    assert ended() == before + 1, "more than the one request above was answered to its end"


def disconnects(gateway: Server) -> float:
    """How many clients have left, by the gateway's own count."""
    return metric(gateway.url, "attnserve_aborts_total{")


@pytest.mark.usefixtures("all_aborted")
@pytest.mark.parametrize("time_of_day", range(3))
def test_mid_stream(gateway: Server, time_of_day: int) -> None:
    before = disconnects(gateway)
    connection = connect(gateway.url, stream=True)
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    leave(connection)
    response.close()
    wait_for_value(lambda: disconnects(gateway), before + 1, "it is counted", PATIENCE)


@pytest.mark.usefixtures("all_aborted")
@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_while_it_waits_for_the_seat(gateway: Server, upstream: Server, stream: bool) -> None:
    seated = connect(upstream.url, stream=True)
    seated_answer = seated.getresponse()
    seated_answer.readline()
    waiting = connect(gateway.url, stream)

    def number_waiting() -> float:
        return upstream_gauge(upstream, "num_requests_waiting")

    wait_for_value(number_waiting, 1, "one request waits", PATIENCE)
    leave(waiting)
    wait_for_value(number_waiting, 0, "none waits", PATIENCE)
    leave(seated)
    seated_answer.close()


@pytest.mark.usefixtures("all_aborted")
@pytest.mark.parametrize("time_of_day", range(3))
def test_not_streaming(gateway: Server, upstream: Server, time_of_day: int) -> None:
    connection = connect(gateway.url, stream=False)
    wait_for_value(lambda: upstream_gauge(upstream, "num_requests_running"), 1, "it runs", PATIENCE)
    leave(connection)


def test_while_it_sends_its_body(gateway: Server) -> None:
    before = disconnects(gateway)
    with socket.create_connection(("127.0.0.1", urlsplit(gateway.url).port or 0)) as client:
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: 99\r\n"
        client.sendall(head + b"Content-Type: application/json\r\n\r\n{")
        time.sleep(0.2)
    wait_for_value(lambda: disconnects(gateway), before + 1, "it is counted", PATIENCE)
