"""Whose fault it is when a request fails: in the answer, the log, the metrics and the circuit."""

import asyncio
import contextlib
import http.client
import json
import logging
import time
from typing import Any

import pytest

from tests.serving.helpers import (
    HttpAnswer,
    Running,
    ask,
    error_of,
    open_request,
    request_lines,
    running,
)
from tests.serving.scripted import (
    BODY,
    DONE,
    EVENTS,
    OK,
    TOKEN,
    Handler,
    Next,
    beside_server,
    chunk,
    says,
)
from tests.serving.standin import StandIn, standin, started, wait_for

DEAD = b"HTTP/1.1 503 No\r\ncontent-length: 0\r\n\r\n"
"""What a vLLM whose engine has died says to a health check."""

AT_ONCE = {"failures": 1}
"""A circuit that opens at the first failure, so that it shows what counts as one."""


class Outcome:
    """What became of one request: its answer, and what the gateway says of it afterwards."""

    answer: HttpAnswer

    def __init__(self, gateway: Running, answer: HttpAnswer | None = None) -> None:
        if answer is not None:
            self.answer = answer
            self.events = answer.body.decode().strip().split("\n\n")
        ended = 'attnserve_requests_total{bits="8",model="m",route="/v1/completions"'
        wait_for(lambda: gateway.metric(ended) > 0, "it is counted")
        lines = ask(gateway.url, "GET", "/metrics").body.decode().splitlines()
        self.failures = {
            line.split('reason="')[1].split('"')[0]: float(line.rsplit(" ", 1)[1])
            for line in lines
            if line.startswith("attnserve_upstream_errors_total{")
        }
        self.codes = {
            line.split('code="')[1].split('"')[0]
            for line in lines
            if line.startswith("attnserve_errors_total{")
        }
        self.circuit_open = gateway.metric("attnserve_replica_circuit_open{") == 1

    @property
    def last_error(self) -> dict[str, Any]:
        """The error of the stream's last event."""
        error: dict[str, Any] = json.loads(self.events[-1].removeprefix("data: "))["error"]
        return error


def outcome(handler: Handler, stream: bool = True, health: bytes = OK, **config: Any) -> Outcome:
    """Return what becomes of a request to a gateway in front of `handler`."""

    def run(url: str) -> Outcome:
        with running(url, breaker=AT_ONCE, **config) as gateway:
            body = {**BODY, "stream": stream}
            return Outcome(gateway, ask(gateway.url, "POST", "/v1/completions", body))

    return beside_server(handler, run, health)


@pytest.fixture
def logged(capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture) -> Any:
    """Return the fields of the last request's log line."""
    caplog.set_level(logging.INFO, "attnserve")
    return lambda: request_lines(capsys)[-1]


# The client


@pytest.mark.parametrize(
    ("patience", "ended"), [({}, True), ({"send": 2.0}, False), ({"total": 3.0}, False)]
)
def test_client_that_does_not_read_is_no_silent_server(
    patience: dict[str, float], ended: bool, logged: Any
) -> None:
    """12 MB, more than fits into the sockets' buffers; the client sleeps for four times as long as
    the server may be silent."""
    events = [
        b'data: {"choices": [{"text": "%05d%b"}]}\n\n' % (i, b"a" * 8000) for i in range(1500)
    ]

    async def all_at_once(
        following: Next, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await following()
        writer.write(EVENTS)
        for event in [*events, DONE]:
            writer.write(chunk(event))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    def run(url: str) -> Outcome:
        timeouts = {"read": 1.0, **patience}
        with running(url, breaker=AT_ONCE, timeouts=timeouts) as gateway:
            response = open_request(gateway.url, {**BODY, "stream": True}).getresponse()
            time.sleep(4)
            got = b""
            with contextlib.suppress(http.client.HTTPException, ConnectionError):
                got = response.read()
            assert got == (b"".join(events) + DONE if ended else b"")
            return Outcome(gateway)

    found = beside_server(all_at_once, run)
    assert not found.failures and not found.circuit_open
    code = None if ended else "client_too_slow"
    assert found.codes == ({code} if code else set())
    assert logged().get("code") == code


# The server's errors inside a stream

SAID = {"message": "no", "type": "x", "param": None}


@pytest.mark.parametrize(
    ("event", "status"),
    [
        (b'data: {"error": {"message": "no", "type": "x", "param": null, "code": 500}}\n\n', 500),
        (b'data: {"error": {"message": "no", "type": "x", "code": 400}}\n\n', 400),
        (b'data:{"error":{"message":"no","type":"x"}}\n\n', 500),
        (b'data: {"object": "error", "message": "no", "type": "x", "code": 503}\r\n\r\n', 503),
        (b'data: { "error": "no"}\n\n', 500),
    ],
)
@pytest.mark.parametrize("together", [True, False])
@pytest.mark.parametrize("health", [OK, DEAD], ids=["healthy", "dead"])
def test_error_inside_a_stream(
    event: bytes, status: int, together: bool, health: bytes, logged: Any
) -> None:
    """With a server that is not healthy then, it stands for a crash (vLLM's EngineDeadError)."""

    async def fail(
        following: Next, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await following()
        pieces = [TOKEN, TOKEN, event + TOKEN, DONE]
        writer.write(EVENTS)
        for piece in [b"".join(pieces)] if together else pieces:
            writer.write(chunk(piece))
            await writer.drain()
            await asyncio.sleep(0 if together else 0.3)
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    found = outcome(fail, health=health)
    assert found.answer.status == 200
    assert len(found.events) == 3
    reason = ("error" if health is OK else "crashed") if status >= 500 else None
    error = found.last_error
    assert (error["message"], error["code"]) == ("no", None)
    assert found.codes == {"upstream_error"}
    assert found.failures == ({reason: 1} if reason else {})
    assert found.circuit_open == (status >= 500)
    line = logged()
    assert (line.get("code"), line.get("upstream_status")) == ("upstream_error", status)
    assert line.get("upstream_error") == reason


def test_error_ends_a_stream_whose_server_says_nothing_more() -> None:
    async def fail(
        following: Next, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await following()
        writer.write(EVENTS + chunk(TOKEN))
        await writer.drain()
        await asyncio.sleep(0.3)
        writer.write(chunk(b'data: {"error": {"message": "no", "code": 500}}\n\n'))
        await reader.read()  # the gateway closes the connection

    assert outcome(fail).last_error["message"] == "no"


def test_server_whose_streams_all_fail_is_left_alone() -> None:
    """Though each of them begins well."""
    error = b'data: {"error": {"message": "no", "code": 500}}\n\n'
    answer = EVENTS + chunk(TOKEN) + chunk(error) + b"0\r\n\r\n"

    def run(url: str) -> None:
        with running(url, breaker={"failures": 3}, limits={"queue_size": 0}) as gateway:
            body = {**BODY, "stream": True}
            for _ in range(3):
                assert ask(gateway.url, "POST", "/v1/completions", body).status == 200
            assert ask(gateway.url, "POST", "/v1/completions", body).status == 503

    beside_server(says(answer), run)


def test_null_is_no_error() -> None:
    event = b'data: {"choices": [{"text": "a"}], "error": null}\n\n'
    found = outcome(says(EVENTS + chunk(event) + chunk(DONE) + b"0\r\n\r\n"))
    assert found.answer.body == event + DONE
    assert not found.codes


def test_500_of_a_healthy_server(logged: Any) -> None:
    """A request can cause it: it is counted, but closes no circuit."""
    found = outcome(says(b"HTTP/1.1 500 No\r\ncontent-length: 2\r\n\r\nno"), stream=False)
    assert found.failures == {"error": 1} and not found.circuit_open
    assert logged()["upstream_error"] == "error"


# Answers that are none

STREAM_TO_THE_END = b"HTTP/1.0 200 OK\r\ncontent-type: text/event-stream\r\n\r\n"


@pytest.mark.parametrize(
    ("rest", "good"),
    [
        (TOKEN + DONE, True),
        (TOKEN + b"data: [DONE]\n", True),
        (TOKEN + TOKEN, False),
        (TOKEN + TOKEN[:20], False),
        (TOKEN + DONE + TOKEN[:20], False),
    ],
)
@pytest.mark.parametrize("framed", [True, False])
def test_stream_that_is_cut_in_an_event(rest: bytes, good: bool, framed: bool) -> None:
    """Where a stream ends with its connection, only [DONE] says that nothing is missing."""
    good = good or (framed and rest.endswith(b"\n\n"))
    answer = EVENTS + chunk(rest) + b"0\r\n\r\n" if framed else STREAM_TO_THE_END + rest
    found = outcome(says(answer))
    if good:
        assert found.answer.body.strip() == rest.strip()
        assert not found.failures
    else:
        assert found.last_error["code"] == "upstream_broken"
        assert found.failures == {"broken": 1}
        whole = rest.decode().split("\n\n")[:-1]
        assert found.events[:-1] == whole


@pytest.mark.parametrize("second", [OK, b"HTTP/1.1 500 No\r\ncontent-length: 2\r\n\r\nno", b"x"])
@pytest.mark.parametrize("stream", [True, False])
def test_second_answer_in_one_read_is_dropped(second: bytes, stream: bool) -> None:
    connections = 0
    whole = EVENTS + chunk(TOKEN + DONE) + b"0\r\n\r\n" if stream else OK

    async def talk(
        following: Next, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        nonlocal connections
        connections += 1
        while True:
            await following()
            writer.write(whole + second)

    def run(url: str) -> list[HttpAnswer]:
        with running(url) as gateway:
            body = {**BODY, "stream": stream}
            return [ask(gateway.url, "POST", "/v1/completions", body) for _ in range(2)]

    expected = TOKEN + DONE if stream else b"{}"
    answers = beside_server(talk, run)
    assert [(a.status, a.body) for a in answers] == [(200, expected)] * 2
    assert connections == 2


@pytest.mark.parametrize("status", [b"600", b"999", b"099", b"000", b"20", b"2000", b"-1"])
def test_no_status_of_http(status: bytes) -> None:
    found = outcome(says(OK.replace(b"200", status)), stream=False)
    assert (found.answer.status, error_of(found.answer)["code"]) == (502, "upstream_broken")


@pytest.mark.parametrize(
    "header",
    [b"content-encoding: gzip", b"Content-Encoding: x", b"transfer-encoding: gzip, chunked"],
)
@pytest.mark.parametrize("kind", [b"application/json", b"text/event-stream"])
def test_coding_that_was_not_asked_for(header: bytes, kind: bytes) -> None:
    head = b"HTTP/1.1 200 OK\r\ncontent-type: %b\r\n%b\r\nconnection: close\r\n\r\n"
    found = outcome(says(head % (kind, header) + b"\x1f\x8b\x08 not gzip"))
    error = error_of(found.answer)
    assert (found.answer.status, error["code"]) == (502, "upstream_unusable")
    assert "which was not asked for" in error["message"]
    assert found.failures == {"unusable": 1} and found.circuit_open


def test_no_coding_is_asked_for() -> None:
    with standin() as upstream, running(upstream.url) as gateway:
        ask(gateway.url, "POST", "/v1/completions", BODY, accept_encoding="gzip")
        assert upstream.seen[0]["headers"]["accept-encoding"] == "identity"


@pytest.mark.parametrize(
    ("start", "more"),
    [
        (b"HTTP/1.1 200 OK\r\n", b"a: " + b"b" * 8000 + b"\r\n"),
        (b"HTTP/1.1 200 OK\r\na: ", b"b" * 8000),
        (b"", b"HTTP/1.1 100 Continue\r\n\r\n" * 300),
        (EVENTS + b"0\r\n", b"a: " + b"b" * 8000 + b"\r\n"),
        (EVENTS + b"1;a=", b"b" * 8000),
    ],
    ids=["headers", "one header", "100s", "trailers", "chunk extension"],
)
def test_head_without_end(start: bytes, more: bytes) -> None:
    sent = 0

    async def endless(
        following: Next, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        nonlocal sent
        await following()
        writer.write(start)
        try:
            while not writer.is_closing():
                writer.write(more)
                await writer.drain()
                sent += len(more)
        except ConnectionError:
            pass

    found = outcome(endless)
    assert (found.answer.status, error_of(found.answer)["code"]) == (502, "upstream_unusable")
    assert sent < 20_000_000  # sockets' buffers


def test_answer_without_end() -> None:
    sent = 0

    async def endless(
        following: Next, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        nonlocal sent
        await following()
        writer.write(b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\n\r\n")
        try:
            while not writer.is_closing():
                writer.write(b" " * 8000)
                await writer.drain()
                sent += 8000
        except ConnectionError:
            pass

    found = outcome(endless, stream=False, limits={"max_answer_bytes": 100_000})
    assert (found.answer.status, error_of(found.answer)["code"]) == (502, "upstream_unusable")
    assert sent < 20_000_000


@pytest.mark.parametrize("number", [b"1" + b"0" * 400, b"-5", b"1.5", b'"7"', b"NaN", b"true"])
def test_usage_that_cannot_be_one(number: bytes, logged: Any) -> None:
    usage = b'data: {"choices": [], "usage": {"prompt_tokens": %b, "completion_tokens": %b}}\n\n'
    stream = chunk(TOKEN) + chunk(usage % (number, number)) + chunk(DONE)
    found = outcome(says(EVENTS + stream + b"0\r\n\r\n"))
    assert found.answer.body == TOKEN + DONE
    assert logged()["completion_tokens"] == 1  # its events


# No such model


def test_server_without_the_model_leaves_its_rotation() -> None:
    with standin("other") as without, standin("m") as having:
        routing = {"policy": "least_loaded"}
        with running(without.url, having.url, breaker=AT_ONCE, routing=routing) as gateway:

            def statuses() -> set[int]:
                answers = [ask(gateway.url, "POST", "/v1/completions", BODY) for _ in range(20)]
                return {answer.status for answer in answers}

            assert statuses() == {200}
            assert (without.started, having.started) == (1, 20)
            assert gateway.metric("attnserve_replica_circuit_open{") == 0
            reason = 'attnserve_upstream_errors_total{bits="8",model="m",reason="no_such_model"'
            assert gateway.metric(reason) == 1
            without.models = ("other", "m")
            wait_for(lambda: statuses() == {200} and without.started > 1, "it is back")


def test_servers_of_every_name_are_asked_for_what_they_have() -> None:
    """Also where one does not say what it has; a name that none has is asked for once."""
    failures = "attnserve_upstream_errors_total{"

    def ask_for(gateway: Running, name: str) -> int:
        return ask(gateway.url, "POST", "/v1/completions", {**BODY, "model": name}).status

    with standin("a") as first, standin("b") as second:
        replicas = [first.url, second.url]
        config = {"models": [{"name": "*", "replicas": replicas}], "breaker": AT_ONCE}
        with running(**config) as gateway:
            listed = ask(gateway.url, "GET", "/v1/models").json()["data"]
            assert {model["id"] for model in listed} == {"a", "b"}
            assert [ask_for(gateway, name) for name in "abab"] == [200] * 4
            assert (first.started, second.started) == (2, 2)
            assert ask_for(gateway, "made-up") == 404
            assert first.started + second.started == 5
            assert gateway.metric(failures) == 0
        first.listed = second.listed = b"no list"
        with running(**config) as gateway:
            assert [ask_for(gateway, name) for name in "ab"] == [200] * 2
            assert gateway.metric(failures) == gateway.metric("attnserve_retries_total{") == 1
            assert gateway.metric("attnserve_replica_circuit_open{") == 0


def test_model_that_no_server_has() -> None:
    with standin("a") as one, standin("b") as other, running(one.url, other.url) as gateway:
        for _ in range(3):
            answer = ask(gateway.url, "POST", "/v1/completions", BODY)
            assert (answer.status, error_of(answer)["code"]) == (404, "model_not_found")


# Names that clients make up


class AnswersAll(StandIn):
    """A server that answers for every name, and lists one."""

    class Names(tuple[str, ...]):
        def __contains__(self, _: object) -> bool:
            return True

    def __init__(self) -> None:
        super().__init__()
        self.models = self.Names(("m",))


@pytest.mark.parametrize("name", ["\ud800", "x" * 100_000, "y\n", "z"])
def test_made_up_names_reach_neither_metrics_nor_logs(name: str, logged: Any) -> None:
    upstream = AnswersAll()
    every = {"name": "*", "replicas": [upstream.url]}
    with started(upstream), running(models=[every]) as gateway:
        for stream in (True, False):
            body = {**BODY, "model": name, "stream": stream}
            assert ask(gateway.url, "POST", "/v1/completions", body).status == 200
        said = logged()["model"]
        page = ask(gateway.url, "GET", "/metrics")
        assert page.status == 200
        assert b'attnserve_requests_total{bits="",model="*"' in page.body
        assert b'model="%b' % name[:1].encode(errors="replace") not in page.body
        assert len(said) <= 128 and said.encode()


def test_listed_names_have_metrics_of_their_own() -> None:
    """Also one that the server begins to list while it runs."""
    upstream = StandIn("m")
    every = {"name": "*", "replicas": [upstream.url]}
    with started(upstream), running(models=[every]) as gateway:
        upstream.models = ("m", "adapter")

        def counted(name: str) -> float:
            ask(gateway.url, "POST", "/v1/completions", {**BODY, "model": name})
            return gateway.metric(f'attnserve_requests_total{{bits="",model="{name}"')

        assert counted("m") > 0
        wait_for(lambda: counted("adapter") > 0, "it is listed")


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "5", "x", "1e999"])
def test_gauge_that_cannot_be_one_is_not_known(value: Any) -> None:
    with standin() as upstream:
        upstream.kv_usage, upstream.kv_bytes = value, "9" * 400  # type: ignore[assignment]
        with running(upstream.url, limits={"queue_size": 0}) as gateway:
            assert ask(gateway.url, "POST", "/v1/completions", BODY).status == 200
            page = ask(gateway.url, "GET", "/metrics").body.decode()
            assert "attnserve_replica_kv_cache_usage_ratio{" not in page
            assert gateway.metric("attnserve_replica_healthy{") == 1
