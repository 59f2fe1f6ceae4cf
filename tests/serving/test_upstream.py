"""Upstreams that misbehave on purpose, as a real vLLM cannot be made to on demand."""

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tests.servers import free_port
from tests.serving.helpers import Answer, ask, error_of, gateway_server

Handler = Callable[[asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"


@asynccontextmanager
async def listening(handler: Handler) -> AsyncIterator[str]:
    """A TCP server on a free port; its address as a URL."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await handler(reader, writer)
        except asyncio.IncompleteReadError:
            pass  # the gateway closed its side
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


async def read_request(reader: asyncio.StreamReader) -> None:
    """One request without a body."""
    await reader.readuntil(b"\r\n\r\n")


def through_gateway(handler: Handler, folder: Path, *pauses: float) -> list[Answer]:
    """Answers to POSTs through a gateway in front of `handler`, with pauses after them."""

    async def run() -> list[Answer]:
        answers = []
        async with listening(handler) as url:
            with gateway_server(url, folder, UPSTREAM_SILENCE_SECONDS="1") as gateway:
                for pause in pauses:
                    answers.append(
                        await asyncio.to_thread(ask, gateway.url, "POST", "/v1/completions")
                    )
                    await asyncio.sleep(pause)
        return answers

    return asyncio.run(run())


def test_connection_closed_while_idle_is_no_error(tmp_path: Path) -> None:
    connections = 0

    async def close_on_second_request(
        reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        nonlocal connections
        connections += 1
        await read_request(reader)
        writer.write(OK)
        await reader.readexactly(1)  # the next request has begun: too late, as after 5 s in vLLM

    answers = through_gateway(close_on_second_request, tmp_path, 0, 0, 0)
    assert [answer.status for answer in answers] == [200, 200, 200]
    assert connections == 3


def test_upstream_that_always_hangs_up_is_tried_twice(tmp_path: Path) -> None:
    connections = 0

    async def hang_up(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        await read_request(reader)

    (answer,) = through_gateway(hang_up, tmp_path, 0)
    assert (answer.status, error_of(answer)["code"]) == (502, "upstream_broken")
    assert connections == 2


@pytest.mark.parametrize(("pause", "expected"), [(0.0, 1), (4.5, 2)])
def test_no_connection_is_used_after_4_s_of_idling(
    tmp_path: Path, pause: float, expected: int
) -> None:
    connections = 0

    async def answer_all(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal connections
        connections += 1
        while True:
            await read_request(reader)
            writer.write(OK)

    answers = through_gateway(answer_all, tmp_path, pause, 0)
    assert [answer.status for answer in answers] == [200, 200]
    assert connections == expected


def test_stream_that_breaks_off_ends_with_an_error_event(tmp_path: Path) -> None:
    async def half_a_stream(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        event = b'data: {"choices": [{"text": "a"}]}\n\n'
        writer.write(EVENTS + b"%x\r\n%b\r\n" % (len(event), event))
        await writer.drain()

    (answer,) = through_gateway(half_a_stream, tmp_path, 0)
    first, last = answer.body.decode().split("\n\n\n\n")
    assert json.loads(first.removeprefix("data: "))["choices"]
    error = json.loads(last.strip().removeprefix("data: "))["error"]
    assert error["code"] == "upstream_broken"
    assert "[DONE]" not in last


def test_answer_that_breaks_off_is_an_error(tmp_path: Path) -> None:
    async def half_an_answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(OK[:-1])
        await writer.drain()

    (answer,) = through_gateway(half_an_answer, tmp_path, 0)
    assert (answer.status, error_of(answer)["code"]) == (502, "upstream_broken")


def test_silent_upstream_times_out(tmp_path: Path) -> None:
    async def say_nothing(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        await reader.read()

    (answer,) = through_gateway(say_nothing, tmp_path, 0)
    assert (answer.status, error_of(answer)["code"]) == (504, "upstream_timeout")


@pytest.mark.parametrize("body", [b"Internal Server Error", b'{"detail": "x"}', b"\xff", b""])
def test_error_bodies_of_any_kind_get_openais_shape(tmp_path: Path, body: bytes) -> None:
    async def fail(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await read_request(reader)
        writer.write(b"HTTP/1.1 500 No\r\ncontent-length: %d\r\n\r\n%b" % (len(body), body))

    (answer,) = through_gateway(fail, tmp_path, 0)
    assert (answer.status, error_of(answer)["type"]) == (500, "server_error")


def test_no_upstream(tmp_path: Path) -> None:
    with gateway_server(f"http://127.0.0.1:{free_port()}", tmp_path) as gateway:
        answer = ask(gateway.url, "GET", "/v1/models")
        assert (answer.status, error_of(answer)["code"]) == (503, "upstream_unreachable")
        assert answer.headers["retry-after"] == "1"
        assert ask(gateway.url, "GET", "/health").status == 503


def test_body_too_large(tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}"
    with gateway_server(url, tmp_path, GATEWAY_MAX_BODY_BYTES="100") as gateway:
        answer = ask(gateway.url, "POST", "/v1/completions", b"x" * 101)
        assert (answer.status, error_of(answer)["code"]) == (413, "body_too_large")
