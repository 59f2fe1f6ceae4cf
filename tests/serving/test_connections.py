"""Clients that send too much, too slowly or nothing, that do not read, and too many of them."""

import http.client
import io
import json
import random
import resource
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import psutil
import pytest

from serving.auth import digest
from tests.servers import Server
from tests.serving.helpers import Running, ask, configured, error_of, metric, open_request, running
from tests.serving.standin import StandIn, standin, wait_for, wait_for_value

KEYS = [{"name": "a", "sha256": digest("secret")}]
KEY = b"Authorization: Bearer secret\r\n"
POST = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
GOOD = json.dumps({"model": "m", "prompt": "x", "max_tokens": 1}).encode()
LENGTH = b"Content-Length: %d\r\n" % len(GOOD)
WHOLE = POST + LENGTH + b"\r\n" + GOOD
NO_JSON = POST + LENGTH + b"\r\n" + b"x" * len(GOOD)
CHUNKED = POST + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%b\r\n0\r\n" % (len(GOOD), GOOD)
UPGRADE = b"Connection: Upgrade\r\nUpgrade: h2c\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
HALF = b"a: %b\r\n" % (b"b" * 40_000)
LARGE = HEALTH[:-2] + b"".join(b"x-%d: abc\r\n" % i for i in range(1500)) + b"\r\n"
SHORT = {"head": 2, "body": 2, "keep_alive": 2}


@pytest.fixture(scope="module")
def upstream() -> Iterator[StandIn]:
    with standin() as server:
        yield server


@pytest.fixture(scope="module")
def gateway(upstream: StandIn) -> Iterator[Running]:
    with running(upstream.url) as gateway:
        yield gateway


@contextmanager
def dial(gateway: Running | Server) -> Iterator[socket.socket]:
    """Yield a connection to the gateway, whose system keeps little that is not read."""
    with socket.socket() as client:
        client.settimeout(30)
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", urlsplit(gateway.url).port))
        yield client


def answer(client: socket.socket) -> tuple[int, http.client.HTTPMessage, bytes]:
    """Return status, headers and body of the next answer on a connection, and read no more."""
    head = b""
    while not head.endswith(b"\r\n\r\n"):
        byte = client.recv(1)
        assert byte, f"closed after {head!r}"
        head += byte
    line, _, fields = head.partition(b"\r\n")
    headers = http.client.parse_headers(io.BytesIO(fields))
    body = b""
    while len(body) < int(headers["content-length"]):
        body += client.recv(int(headers["content-length"]) - len(body))
    return int(line.split()[1]), headers, body


def closed(client: socket.socket) -> bool:
    """Wait until the gateway closes a connection; return whether it said nothing more before."""
    with suppress(ConnectionResetError):
        return client.recv(1) == b""
    return True


def refusal(client: socket.socket) -> tuple[int, str | None]:
    """Return status and code of an error, after which the connection is closed."""
    status, headers, body = answer(client)
    assert headers["connection"] == "close"
    assert closed(client)
    return status, json.loads(body)["error"]["code"]


def flood(client: socket.socket, start: bytes, piece: bytes, megabytes: float) -> None:
    """Send a piece again and again, until it is enough or the gateway takes no more."""
    with suppress(ConnectionError):
        client.sendall(start)
        block = piece * (2**18 // len(piece))
        for _ in range(int(megabytes * 2**20 / len(block))):
            client.sendall(block)


FLOODS = {
    "headers": (POST, b"x-a: b\r\n"),
    "one header": (POST + b"x-a: ", b"b"),
    "one name": (POST, b"b"),
    "URL": (b"GET /", b"a"),
    "trailers": (CHUNKED, b"x-a: b\r\n"),
    "one trailer": (CHUNKED + b"x-a: ", b"b"),
    "nothing": (b"", b"\r\n"),
    "a chunk's size": (POST + b"Transfer-Encoding: chunked\r\n\r\n1;a=", b"b"),
}
"""What has no end: its start, and what follows."""


@pytest.mark.parametrize("flooding", FLOODS)
def test_head_without_end_is_refused(gateway: Running, flooding: str) -> None:
    with dial(gateway) as client:
        flood(client, *FLOODS[flooding], megabytes=2)
        assert refusal(client) == (431, "head_too_large")


@pytest.mark.parametrize(
    ("head", "status"),
    [
        (HEALTH[:-2] + b"a: %b\r\n\r\n" % (b"b" * 60_000), 200),
        (HEALTH[:-2] + b"a: %b\r\n\r\n" % (b"b" * 66_000), 431),
        (b"GET /health?%b HTTP/1.1\r\n\r\n" % (b"b" * 60_000), 200),
        (b"GET /health?%b HTTP/1.1\r\n\r\n" % (b"b" * 66_000), 431),
        (b"GET /health?%b HTTP/1.1\r\na: %b\r\n\r\n" % (b"b" * 40_000, b"b" * 40_000), 431),
        (HEALTH[:-2] + b"a: b\r\n" * 1500 + b"\r\n", 200),
        (HEALTH[:-2] + b"a: b\r\n" * 2500 + b"\r\n", 431),
        (CHUNKED + b"a: %b\r\n\r\n" % (b"b" * 60_000), 200),
        (CHUNKED + b"a: %b\r\n\r\n" % (b"b" * 66_000), 431),
        (POST + HALF + CHUNKED[len(POST) :] + HALF + b"\r\n", 431),
        (POST + b"Content-Length: 300000\r\n\r\n" + GOOD.ljust(300_000), 200),
    ],
)  # fmt: skip
@pytest.mark.parametrize("at_once", [True, False], ids=["at once", "in pieces"])
def test_limit_of_a_head(gateway: Running, head: bytes, status: int, at_once: bool) -> None:
    size = len(head) if at_once else 5000
    with dial(gateway) as client:
        with suppress(ConnectionError):
            for i in range(0, len(head), size):
                client.sendall(head[i : i + size])
        assert answer(client)[0] == status
        if status == 200:  # and each request has the whole limit
            client.sendall(head)
            assert answer(client)[0] == 200


def test_trailers_are_dropped(upstream: StandIn, gateway: Running) -> None:
    trailer = KEY + b"X-Trailer: b\r\n\r\n"
    with dial(gateway) as client:
        client.sendall(CHUNKED + trailer)
        assert answer(client)[0] == 200
    assert not {"authorization", "x-trailer"} & set(upstream.seen[-1]["headers"])
    with running(upstream.url, keys=KEYS) as locked, dial(locked) as client:
        client.sendall(CHUNKED + trailer)
        assert answer(client)[0] == 401


@pytest.mark.parametrize("protocol", [b"h2c", b"websocket", b"x"])
@pytest.mark.parametrize("body", ["length", "chunked", "none"])
def test_upgrades_are_ignored(gateway: Running, protocol: bytes, body: str) -> None:
    request = {"length": WHOLE, "chunked": CHUNKED + b"\r\n", "none": HEALTH}[body]
    upgrade = b"Connection: Upgrade, HTTP2-Settings\r\nUpgrade: %b\r\n" % protocol
    line, _, rest = request.partition(b"\n")
    with dial(gateway) as client:
        client.sendall((line + b"\n" + upgrade + rest) * 2)
        assert answer(client)[0] == answer(client)[0] == 200
        client.sendall(HEALTH)
        assert answer(client)[0] == 200


@pytest.mark.parametrize(
    ("parts", "status", "code"),
    [
        ([b"nonsense\r\n\r\n"], 400, "invalid_http"),
        ([b"CONNECT x:1 HTTP/1.1\r\n\r\n"], 405, "method_not_supported"),
        ([POST + UPGRADE + LENGTH + b"Transfer-Encoding: chunked\r\n\r\n"], 400, "invalid_http"),
        ([POST + UPGRADE + LENGTH + LENGTH + b"\r\n"], 400, "invalid_http"),
        ([POST + UPGRADE + b"Transfer-Encoding: x\r\n\r\n"], 400, "invalid_http"),
        (
            [POST + b"Expect: 100-continue\r\nTransfer-Encoding: chunked\r\n\r\nq\r\n"],
            400,
            "invalid_http",
        ),
        ([POST + b"Transfer-Encoding: chunked\r\n\r\n", b"q\r\n"], 400, "invalid_http"),
    ],
)
def test_what_is_not_http(
    gateway: Running, parts: list[bytes], status: int, code: str, caplog: pytest.LogCaptureFixture
) -> None:
    with dial(gateway) as client:
        for part in parts:
            client.sendall(part)
            time.sleep(0.1)
        assert refusal(client) == (status, code)
    assert "the gateway failed" not in caplog.text


def test_nonsense_behind_a_request_is_no_part_of_its_answer(upstream: StandIn) -> None:
    body = {"model": "m", "prompt": "x", "max_tokens": 10, "stream": True}
    upstream.between_s = 0.4  # for longer than any of the times
    try:
        with running(upstream.url, timeouts=SHORT) as gateway:
            connection = open_request(gateway.url, body)
            response = connection.getresponse()
            connection.sock.sendall(b"nonsense\r\n\r\n")
            assert response.read().endswith(b"data: [DONE]\n\n")
            assert closed(connection.sock)
    finally:
        upstream.between_s = 0.0


@pytest.mark.parametrize("behind", [b"", HEALTH])
def test_head_gets_no_body(gateway: Running, behind: bytes) -> None:
    with dial(gateway) as client:
        client.sendall(b"HEAD /v1/completions HTTP/1.1\r\nHost: localhost\r\n\r\n" + behind)
        head = b""
        while not head.endswith(b"\r\n\r\n"):
            head += client.recv(1)
        assert head.startswith(b"HTTP/1.1 405")
        client.sendall(b"" if behind else HEALTH)
        assert answer(client)[0] == 200


@pytest.mark.parametrize("head", [HEALTH, WHOLE, WHOLE + HEALTH, NO_JSON])
def test_http_1_0_has_no_chunks(gateway: Running, head: bytes) -> None:
    """An answer of known length says so, and the connection ends with it."""
    with dial(gateway) as client:
        client.sendall(head.replace(b"HTTP/1.1", b"HTTP/1.0"))
        _, headers, body = answer(client)
        assert headers["connection"] == "close" and "transfer-encoding" not in headers
        assert json.loads(body) and closed(client)


def test_http_1_0_has_streams_without_chunks(gateway: Running) -> None:
    body = {"model": "m", "prompt": "x", "max_tokens": 20, "stream": True}
    expected = ask(gateway.url, "POST", "/v1/completions", body).body
    raw = json.dumps(body).encode()
    with dial(gateway) as client:
        head = POST.replace(b"HTTP/1.1", b"HTTP/1.0") + b"Connection: keep-alive\r\n"
        client.sendall(head + b"Content-Length: %d\r\n\r\n" % len(raw) + raw)
        whole = b""
        while piece := client.recv(65536):
            whole += piece
    fields, _, events = whole.partition(b"\r\n\r\n")
    assert events == expected and events.count(b"data: ") == 21
    assert b"transfer-encoding" not in fields and b"connection: close" in fields


# Time


def test_silence(upstream: StandIn) -> None:
    with running(upstream.url, timeouts=SHORT) as gateway, ExitStack() as stack:
        silent, half, idle, next_half = (stack.enter_context(dial(gateway)) for _ in range(4))
        half.sendall(b"POST /v1/com")
        idle.sendall(WHOLE)
        next_half.sendall(WHOLE + b"POST")
        assert answer(idle)[0] == answer(next_half)[0] == 200
        assert refusal(half) == refusal(next_half) == (408, "head_timeout")
        assert closed(silent) and closed(idle)
        connections = gateway.server.server_state.connections
        wait_for(lambda: not connections, "not even those are left whose clients do not close")


def drip(client: socket.socket) -> None:
    """Send a byte again and again until the connection is closed."""
    with suppress(OSError):
        while True:
            client.sendall(b"x")
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("request_", "status"),
    [
        (POST[:-2], 408),  # a header without end
        (POST + KEY + b"Content-Length: 9999\r\n\r\n", 408),
        (POST + b"Content-Length: 9999\r\n\r\n", 401),
        (POST + KEY + b"Content-Length: 999999999\r\n\r\n", 413),
        (b"POST /nothing HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n", 404),
        (b"GET /health HTTP/1.1\r\nHost: localhost\r\nContent-Length: 9999\r\n\r\n", 200),
    ],
    ids=["head", "body", "refused", "too large", "no route", "unread"],
)
def test_drops_of_a_request(upstream: StandIn, request_: bytes, status: int) -> None:
    with running(upstream.url, keys=KEYS, timeouts=SHORT) as gateway, dial(gateway) as client:
        client.sendall(request_)
        threading.Thread(target=drip, args=(client,), daemon=True).start()
        got, headers, _ = answer(client)
        assert (got, headers["connection"]) == (status, "close")
        assert closed(client)


def test_early_answer_reaches_a_client_that_sends_first(upstream: StandIn) -> None:
    with running(upstream.url, keys=KEYS) as gateway:
        for _ in range(5):
            refused = ask(gateway.url, "POST", "/v1/completions", b" " * 10_000_000)
            assert refused.status == 401 and error_of(refused)
            assert refused.headers["connection"] == "close"


@pytest.mark.parametrize(
    ("stream", "timeouts", "reason"),
    [
        (True, {"send": 1}, "not_reading"),
        (False, {"send": 1}, "not_reading"),
        (True, {"total": 2}, "total"),
        (False, {"total": 2}, "total"),
    ],
    ids=["stream", "whole", "stream's total", "whole's total"],
)
def test_client_that_does_not_read(
    upstream: StandIn, stream: bool, timeouts: dict[str, float], reason: str
) -> None:
    body = {"model": "m", "prompt": "x", "max_tokens": 100_000, "stream": stream}
    upstream.padding, upstream.text = "x" * 10_000, "x" * 20_000_000
    aborted = upstream.aborted
    try:
        with running(upstream.url, timeouts=timeouts) as gateway, dial(gateway) as client:
            raw = json.dumps(body).encode()
            client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(raw) + raw)
            wait_for_value(
                lambda: gateway.metric(f'attnserve_connections_cut_total{{reason="{reason}"'),
                1, "it is cut off",
            )  # fmt: skip
            wait_for(lambda: gateway.state.in_flight == 0, "its request has ended")
            code = 'attnserve_errors_total{bits="8",code="client_too_slow"'
            assert not stream or gateway.metric(code) == 1
            if stream:
                wait_for_value(lambda: upstream.aborted, aborted + 1, "its server knows")
    finally:
        upstream.padding = upstream.text = ""


def test_client_that_reads_slowly_has_it_all(upstream: StandIn) -> None:
    upstream.text = "x" * 20_000_000
    try:
        times = {"send": 3, "keep_alive": 3}
        with running(upstream.url, timeouts=times) as gateway, dial(gateway) as client:
            client.sendall(WHOLE)
            response = http.client.HTTPResponse(client)
            response.begin()
            size = 0
            while piece := response.read(2_000_000):
                size += len(piece)
                time.sleep(0.5)
            assert size > 20_000_000
    finally:
        upstream.text = ""


# Their number


def test_at_the_limit_health_is_answered(
    upstream: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.connection.SILENT_SECONDS", 3600.0)
    body = {"model": "m", "prompt": "x", "stream": True}
    upstream.before_s = 60
    try:
        with running(upstream.url, limits={"max_connections": 3}) as gateway, ExitStack() as stack:
            for _ in range(3):
                stack.callback(open_request(gateway.url, body).close)
            wait_for(lambda: gateway.state.in_flight == 3, "all run")
            for _ in range(2):
                with dial(gateway) as client:
                    client.sendall(WHOLE)
                    assert refusal(client) == (503, "too_many_connections")
                assert ask(gateway.url, "GET", "/health").status == 200
            clients = [stack.enter_context(dial(gateway)) for _ in range(33)]
            assert closed(clients[-1])  # not even the reserve has room
            monkeypatch.setattr("serving.connection.SILENT_SECONDS", 0.0)
            wait_for(lambda: ask_health(gateway), "the silent give way")
    finally:
        upstream.before_s = 0.0


def ask_health(gateway: Running | Server) -> bool:
    """Whether /health is answered."""
    with suppress(OSError, http.client.HTTPException):
        return ask(gateway.url, "GET", "/health").status == 200
    return False


@pytest.mark.integration
def test_more_silent_clients_than_descriptors(upstream: StandIn, tmp_path: Path) -> None:
    config = {"models": [{"name": "m", "replicas": [upstream.url]}]}
    with configured(tmp_path, config) as gateway, ExitStack() as stack:
        resource.prlimit(gateway.pid, resource.RLIMIT_NOFILE, (200, 200))
        for i in range(300):
            client = stack.enter_context(dial(gateway))
            with suppress(ConnectionError):
                client.sendall(b"POST /v1" if i % 2 else b"")

        def served() -> bool:
            with suppress(OSError, http.client.HTTPException):
                return ask(gateway.url, "POST", "/v1/completions", GOOD).status == 200
            return False

        wait_for(served, "a client with a request is served")
        assert ask_health(gateway)
        assert gateway.log().count("clients have as many connections as they may") == 1


# Memory


def test_bodies_have_a_limit_together(upstream: StandIn) -> None:
    half = POST + b"Content-Length: 1000\r\n\r\n" + b" " * 700
    limits = {"max_held_bytes": 1000}
    with running(upstream.url, limits=limits) as gateway, dial(gateway) as first:
        first.sendall(half)
        wait_for(lambda: gateway.state.held_bytes == 700, "it is held")
        with dial(gateway) as second:
            second.sendall(half)
            assert refusal(second) == (503, "too_many_bytes")
        first.sendall(b" " * (300 - len(GOOD)) + GOOD)
        assert answer(first)[0] == 200
        wait_for(lambda: gateway.state.held_bytes == 0, "nothing is held any more")


def test_heads_that_do_not_end_have_a_limit_together(
    gateway: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("serving.connection.MAX_HEADS_BYTES", 100_000)
    half = b"GET /health HTTP/1.1\r\nHost: 127.0.0.1\r\nx-a: " + b"b" * 40_000
    with dial(gateway) as first, dial(gateway) as second, dial(gateway) as third:
        for client in (first, second):
            client.sendall(half)
        wait_for(lambda: heads(gateway) == 2 * len(half), "both are here")
        third.sendall(half)
        assert refusal(third) == (503, "too_many_connections")
        first.close()
        wait_for(lambda: heads(gateway) == len(half), "there is room again")
        second.sendall(b"\r\n\r\n")
        assert answer(second)[0] == 200
    assert heads(gateway) == 0
    many = HEALTH[:-2] + b"a: b\r\n" * 1500  # 9 KB, but each takes what an object does
    with dial(gateway) as first, dial(gateway) as second:
        first.sendall(many)
        wait_for(lambda: heads(gateway) > 50_000, "it is here")
        second.sendall(many)
        assert refusal(second) == (503, "too_many_connections")


def heads(gateway: Running) -> int:
    """Return how many bytes of heads that have not ended the gateway holds."""
    factory: Any = gateway.server.config.http
    held: int = factory.args[0].head_bytes
    return held


def cpu_seconds(process: psutil.Process) -> float:
    """Return the CPU time of a process so far."""
    times = process.cpu_times()
    return float(times.user + times.system)


@pytest.mark.integration
def test_floods_leave_no_memory_behind(upstream: StandIn, tmp_path: Path) -> None:
    """Of heads without end, of those of clients that then are idle, and of bodies that take many
    times their bytes when they are parsed."""
    numbers = ",".join(str(1000 + i % 9000) for i in range(800_000))
    worst = b'{"model": "m", "max_tokens": 1, "prompt": [%b]}' % numbers.encode()
    bearer = "Bearer secret"
    config = {"models": [{"name": "m", "replicas": [upstream.url]}], "keys": KEYS}
    with configured(tmp_path, config) as gateway, ExitStack() as idle:
        process = psutil.Process(gateway.pid)

        def send_worst() -> int:
            url = gateway.url
            return ask(url, "POST", "/v1/completions", worst, authorization=bearer).status

        for _ in range(50):
            assert ask_health(gateway)
        assert send_worst() == 200
        before = process.memory_info().rss
        for start, piece in FLOODS.values():
            with dial(gateway) as client:
                flood(client, start, piece, megabytes=60)
            assert ask_health(gateway)
        for _ in range(100):
            client = idle.enter_context(dial(gateway))
            client.sendall(LARGE)
            assert answer(client)[0] == 200
        children = process.children(recursive=True)  # what reads large bodies
        assert children
        own, reader = cpu_seconds(process), cpu_seconds(children[-1])
        assert [send_worst() for _ in range(8)] == [200] * 8
        own, reader = cpu_seconds(process) - own, cpu_seconds(children[-1]) - reader
        assert own < reader / 2, "streams wait while the gateway itself reads them"
        # The last body may still be on its way to the process that reads it.
        wait_for(lambda: process.memory_info().rss - before < 5 * 2**20, "nothing is left of them")
        process.kill()
        assert not psutil.wait_procs(children, timeout=30)[1]


@pytest.mark.integration
def test_mutated_requests_do_no_harm(upstream: StandIn, tmp_path: Path) -> None:
    """Several requests at once, with bytes changed or left out, in pieces of any size."""
    chance = random.Random(0)
    upgraded = POST + UPGRADE + CHUNKED[len(POST) :] + b"\r\n"
    continued = POST + b"Expect: 100-continue\r\n" + LENGTH + b"\r\n" + GOOD
    good = (WHOLE, CHUNKED + KEY + b"\r\n", upgraded, continued, HEALTH)
    config = {"models": [{"name": "m", "replicas": [upstream.url]}], "timeouts": SHORT}
    with configured(tmp_path, config) as gateway:
        for _ in range(300):
            data = bytearray(b"".join(chance.choices(good, k=chance.randint(1, 4))))
            for _ in range(chance.randint(0, 3)):
                at = chance.randrange(len(data))
                if chance.random() < 0.5:
                    data[at] = chance.randrange(256)
                else:
                    del data[at : at + chance.randint(1, 10)]
            size = chance.choice((10, 100, 10_000))
            with dial(gateway) as client, suppress(ConnectionError):
                for i in range(0, len(data), size):
                    client.sendall(data[i : i + size])
                if chance.random() < 0.5:
                    client.recv(1)
        in_flight = "attnserve_requests_in_flight"
        wait_for_value(lambda: metric(gateway.url, in_flight), 1, "only this one")
        assert '"level": "error"' not in gateway.log()
