"""Upstreams that misbehave on purpose, as a real vLLM cannot be made to on demand."""

import asyncio
import json
import time
from pathlib import Path

import pytest

from serving.openai.errors import MAX_ERROR
from tests.servers import free_port
from tests.serving.helpers import ask, error_of, gateway_server, leave, open_request, running
from tests.serving.scripted import (
    BODY,
    EVENTS,
    OK,
    TOKEN,
    Next,
    beside_server,
    chunk,
    says,
    through_gateway,
)


def test_upstream_that_always_hangs_up_is_an_error() -> None:
    connections = 0

    async def hang_up(
        following: Next, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        nonlocal connections
        connections += 1
        await following()

    (answer,) = through_gateway(hang_up, 0)
    assert (answer.status, error_of(answer)["code"]) == (502, "upstream_broken")
    assert connections == 1


@pytest.mark.parametrize(("pause", "expected"), [(0.0, 1), (2.5, 2)])
def test_no_connection_is_used_after_idling(pause: float, expected: int) -> None:
    connections = 0

    async def answer_all(
        following: Next, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        nonlocal connections
        connections += 1
        while True:
            await following()
            writer.write(OK)

    answers = through_gateway(answer_all, pause, 0)
    assert [answer.status for answer in answers] == [200, 200]
    assert connections == expected


def test_stream_that_breaks_off_ends_with_an_error_event() -> None:
    (answer,) = through_gateway(says(EVENTS + chunk(TOKEN)), 0)
    first, last = answer.body.decode().strip().split("\n\n")
    assert json.loads(first.removeprefix("data: "))["choices"]
    error = json.loads(last.strip().removeprefix("data: "))["error"]
    assert error["code"] == "upstream_broken"
    assert "[DONE]" not in last


def test_answer_that_breaks_off_is_an_error() -> None:
    (answer,) = through_gateway(says(OK[:-1]), 0)
    assert (answer.status, error_of(answer)["code"]) == (502, "upstream_broken")


def test_silent_upstream_times_out() -> None:
    async def say_nothing(
        following: Next, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await following()
        await reader.read()

    (answer,) = through_gateway(say_nothing, 0)
    assert (answer.status, error_of(answer)["code"]) == (504, "upstream_timeout")


VALIDATION = b'{"detail": [{"loc": ["body", "input"], "msg": "Field required", "type": "missing"}]}'
EMBEDDINGS = b'{"detail": "Not Found"}'
"""What vLLM answers to /v1/embeddings where the model cannot."""


@pytest.mark.parametrize(
    ("body", "message", "kind", "param"),
    [
        (b"Bad Request", "Bad Request", "invalid_request_error", None),
        (b"\xff", "\ufffd", "invalid_request_error", None),
        (b"", "Bad Request", "invalid_request_error", None),
        (b"x" * 100_000, "x" * 4096, "invalid_request_error", None),
        (EMBEDDINGS, "Not Found", "invalid_request_error", None),
        (VALIDATION, "Field required", "invalid_request_error", "input"),
        (b'{"error": {"message": "a", "type": "T", "code": 400}}', "a", "T", None),
        (b'{"object": "error", "message": "a", "type": "T", "code": 400}', "a", "T", None),
        (b'{"error": "a", "error_type": "T"}', "a", "invalid_request_error", None),
        (b'{"message": "a"}', "a", "invalid_request_error", None),
        (b'{"error": {"message": 7}}', '{"error": {"message": 7}}', "invalid_request_error", None),
        (b'{"detail": []}', '{"detail": []}', "invalid_request_error", None),
        (b'{"detail": [[]]}', '{"detail": [[]]}', "invalid_request_error", None),
        (b"[" * 2000, "[" * 2000, "invalid_request_error", None),
        # Too long to be parsed: that could take a hundred times its size.
        (VALIDATION.rjust(MAX_ERROR), "Field required", "invalid_request_error", "input"),
        (VALIDATION.ljust(MAX_ERROR + 1), VALIDATION.decode(), "invalid_request_error", None),
    ],
)
def test_error_bodies_of_any_kind_get_openais_shape(
    body: bytes, message: str, kind: str, param: str | None
) -> None:
    (answer,) = through_gateway(
        says(b"HTTP/1.1 400 No\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body)), 0
    )
    error = error_of(answer)
    assert (answer.status, error["message"], error["type"]) == (400, message, kind)
    assert (error["param"], error["code"]) == (param, None)


def test_no_upstream() -> None:
    with running(f"http://127.0.0.1:{free_port()}") as gateway:
        answer = ask(gateway.url, "POST", "/v1/completions", BODY)
        assert (answer.status, error_of(answer)["code"]) == (503, "upstream_unreachable")
        assert answer.headers["retry-after"] == "1"
        assert answer.headers["retry-after-ms"] == "1000"
        assert ask(gateway.url, "GET", "/health").status == 503


def test_no_upstream_in_the_simple_case(tmp_path: Path) -> None:
    with gateway_server(f"http://127.0.0.1:{free_port()}", tmp_path) as gateway:
        answer = ask(gateway.url, "GET", "/v1/models")
        assert (answer.status, error_of(answer)["code"]) == (503, "upstream_unreachable")
        assert answer.headers["retry-after"] == "1"


def test_answer_in_any_pieces_is_the_same() -> None:
    """Byte by byte, with a 1xx answer before it and chunk extensions in it."""
    whole = (
        b"HTTP/1.1 103 Early Hints\r\nlink: x\r\n\r\n"
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n"
        b"3;a=b\r\n{} \r\n1\r\n \r\n0\r\ntrailer: x\r\n\r\n"
    )

    async def slowly(
        following: Next, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await following()
        for byte in whole:
            writer.write(bytes([byte]))
            await writer.drain()
            await asyncio.sleep(0.0005)

    (answer,) = through_gateway(slowly, 0)
    assert (answer.status, answer.body) == (200, b"{}  ")


def test_answer_that_ends_with_its_connection() -> None:
    (answer,) = through_gateway(
        says(b"HTTP/1.0 200 OK\r\ncontent-type: application/json\r\n\r\n{}"), 0
    )
    assert (answer.status, answer.body) == (200, b"{}")


@pytest.mark.parametrize("garbage", [b"SSH-2.0-x\r\n", b"HTTP/1.1 200 OK\r\nx y\r\n\r\n"])
def test_no_http_is_an_error(garbage: bytes) -> None:
    (answer,) = through_gateway(says(garbage), 0)
    assert (answer.status, error_of(answer)["code"]) == (502, "upstream_broken")


def test_slow_client_holds_the_upstream_back() -> None:
    """A reader that stops reading stops the writer: nothing piles up in the gateway."""
    sent = 0

    async def endless(
        following: Next, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        nonlocal sent
        await following()
        writer.write(EVENTS)
        event = b'data: {"choices": [{"text": "%b"}]}\n\n' % (b"a" * 8000)
        while not writer.is_closing():
            writer.write(chunk(event))
            await writer.drain()
            sent += len(event)

    def client(url: str) -> None:
        with running(url) as gateway:
            connection = open_request(gateway.url, {**BODY, "stream": True})
            connection.getresponse().read(10)
            before = -1
            while sent != before:  # until it stands still
                before = sent
                time.sleep(0.5)
            leave(connection)

    beside_server(endless, client)
    assert sent < 50_000_000  # sockets' buffers, at most some megabytes each


def test_client_that_pauses_gets_every_event_in_order() -> None:
    """12 MB, more than fits into the sockets' buffers while the client does not read."""
    text = b'data: {"choices": [{"text": "%05d%b"}]}\n\n'
    events = [text % (i, b"a" * 8000) for i in range(1500)]
    got = b""

    async def all_at_once(
        following: Next, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await following()
        writer.write(EVENTS)
        for event in events:
            writer.write(chunk(event))
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    def client(url: str) -> None:
        nonlocal got
        with running(url) as gateway:
            connection = open_request(gateway.url, {**BODY, "stream": True})
            answer = connection.getresponse()
            for _ in range(3):
                got += answer.read(2_000_000)
                time.sleep(0.3)
            got += answer.read()

    beside_server(all_at_once, client)
    assert got == b"".join(events)
