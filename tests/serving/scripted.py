"""A model server that does what a test's own few lines say, on a plain socket."""

import asyncio
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from typing import Any, TypeVar

from tests.serving.helpers import HttpAnswer, ask, running

Next = Callable[[], Awaitable[None]]
Handler = Callable[[Next, asyncio.StreamReader, asyncio.StreamWriter], Awaitable[None]]

OK = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: 2\r\n\r\n{}"
EVENTS = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\ntransfer-encoding: chunked\r\n\r\n"
BODY = {"model": "m", "prompt": "x"}
TOKEN = b'data: {"choices": [{"text": "a"}]}\n\n'
DONE = b"data: [DONE]\n\n"

T = TypeVar("T")


def chunk(data: bytes) -> bytes:
    """Return data as a chunk of a body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def says(answer: bytes) -> Handler:
    """Return a server that says the same to every request, and then closes the connection."""

    async def say(
        following: Next, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await following()
        writer.write(answer)
        await writer.drain()

    return say


@asynccontextmanager
async def listening(handler: Handler, health: bytes = OK) -> AsyncIterator[str]:
    """Run a TCP server on a free port; yield its URL. `handler` gets connections on which a
    request has begun that is no health check, which `health` answers; `Next` returns when one has
    been read whole."""

    async def handle(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        heads = [await reader.readuntil(b"\r\n\r\n")]

        async def following() -> None:
            head = heads.pop() if heads else await reader.readuntil(b"\r\n\r\n")
            await reader.readexactly(int(head.lower().split(b"content-length: ")[1].split()[0]))

        try:
            if heads[0].startswith(b"GET"):
                writer.write(health.replace(b"\r\n\r\n", b"\r\nconnection: close\r\n\r\n"))
            else:
                await handler(following, reader, writer)
        except asyncio.IncompleteReadError:
            pass  # the gateway closed its side
        finally:
            writer.close()

    server = await asyncio.start_server(handle, "127.0.0.1", 0)
    async with server:
        yield f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"


def beside_server(handler: Handler, client: Callable[[str], T], health: bytes = OK) -> T:
    """Return what `client` does, which gets the address of a server that runs meanwhile."""

    async def serve() -> T:
        async with listening(handler, health) as url:
            return await asyncio.to_thread(client, url)

    return asyncio.run(serve())


def through_gateway(
    handler: Handler, *pauses: float, stream: bool = False, **config: Any
) -> list[HttpAnswer]:
    """Answers to POSTs through a gateway in front of `handler`, with pauses after them."""
    body = {**BODY, "stream": True} if stream else BODY
    config = {"timeouts": {"read": 5, "idle": 2}, **config}

    def ask_all(url: str) -> list[HttpAnswer]:
        answers = []
        with running(url, **config) as gateway:
            for pause in pauses:
                answers.append(ask(gateway.url, "POST", "/v1/completions", body))
                time.sleep(pause)
        return answers

    return beside_server(handler, ask_all)
