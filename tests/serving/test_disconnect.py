"""A client that leaves frees its request upstream: mid-stream, before the first token, unstreamed.

The upstream has one seat, and a request here would keep it for a minute or more; so the request
after one whose client left is answered soon only if that one was aborted.
"""

import http.client
import json
import socket
import time
from urllib.parse import urlsplit

import pytest

from tests.servers import Server
from tests.serving.helpers import MODEL, completion, leave
from tests.serving.standin import wait_for

SOON = 10.0
"""Seconds; a request of one token takes a fraction of one."""

LONG = 16000
"""Tokens, near the model's whole context; more than a minute on two cores."""


def connect(url: str, stream: bool) -> http.client.HTTPConnection:
    """Send a request for LONG tokens and do not wait for an answer."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    body = {"model": MODEL, "prompt": "x", "max_tokens": LONG, "ignore_eos": True, "stream": stream}
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    return connection


def upstream_gauge(upstream: Server, name: str) -> float:
    """One of vLLM's own gauges."""
    return metric(upstream, f"vllm:{name}{{")


def metric(server: Server, start: str) -> float:
    """The sum of the lines of `server`'s /metrics that start like this."""
    connection = http.client.HTTPConnection(urlsplit(server.url).netloc, timeout=10)
    connection.request("GET", "/metrics")
    lines = connection.getresponse().read().decode().splitlines()
    connection.close()
    return sum(float(line.rsplit(" ", 1)[1]) for line in lines if line.startswith(start))


def assert_seat_is_free(upstream: Server) -> None:
    """The next request is answered soon."""
    began = time.monotonic()
    completion(upstream.url, timeout=SOON, max_tokens=1)
    assert time.monotonic() - began < SOON


def disconnects(gateway: Server) -> float:
    """How many clients have left, by the gateway's own count."""
    return metric(gateway, "attnserve_aborts_total{")


@pytest.mark.parametrize("time_of_day", range(3))
def test_mid_stream(gateway: Server, upstream: Server, time_of_day: int) -> None:
    before = disconnects(gateway)
    connection = connect(gateway.url, stream=True)
    response = connection.getresponse()
    assert response.readline().startswith(b"data: ")
    leave(connection)
    response.close()
    assert_seat_is_free(upstream)
    wait_for(lambda: disconnects(gateway) == before + 1, "the gateway counts the disconnect")


@pytest.mark.parametrize("stream", [True, False], ids=["stream", "whole"])
def test_while_it_waits_for_the_seat(gateway: Server, upstream: Server, stream: bool) -> None:
    seated = connect(upstream.url, stream=True)
    seated_answer = seated.getresponse()
    seated_answer.readline()
    waiting = connect(gateway.url, stream)
    wait_for(lambda: upstream_gauge(upstream, "num_requests_waiting") == 1, "one request waits")
    leave(waiting)
    wait_for(lambda: upstream_gauge(upstream, "num_requests_waiting") == 0, "none waits")
    leave(seated)
    seated_answer.close()
    assert_seat_is_free(upstream)


@pytest.mark.parametrize("time_of_day", range(3))
def test_not_streaming(gateway: Server, upstream: Server, time_of_day: int) -> None:
    connection = connect(gateway.url, stream=False)
    wait_for(lambda: upstream_gauge(upstream, "num_requests_running") == 1, "the request runs")
    leave(connection)
    assert_seat_is_free(upstream)


def test_while_it_sends_its_body(gateway: Server) -> None:
    before = disconnects(gateway)
    with socket.create_connection(("127.0.0.1", urlsplit(gateway.url).port or 0)) as client:
        client.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Length: 99\r\n\r\n{")
        time.sleep(0.2)
    wait_for(lambda: disconnects(gateway) == before + 1, "the gateway counts the disconnect")
