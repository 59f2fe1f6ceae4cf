"""The client's side of a request: its HTTP connection, its body, and whether it is still there."""

import asyncio
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from starlette.types import Receive, Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from serving.openai.errors import ApiError

MAX_PIPELINED = 16
"""Requests that may wait on one connection for the one before; with more, it is closed."""


class Protocol(HttpToolsProtocol):
    """One connection of a client to uvicorn; every request on it hears when the client has left.

    A client may send a request before the one before it is answered. uvicorn then stops reading
    from its connection, so it does not see that the client leaves, and tells it only to the request
    that came last, which has not begun. The one that runs would go on in vLLM to its end.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unanswered: list[RequestResponseCycle] = []

    def on_headers_complete(self) -> None:
        """Begin a request."""
        super().on_headers_complete()
        self._unanswered = [cycle for cycle in self._unanswered if not cycle.response_complete]
        if self.cycle is not None:
            self._unanswered.append(self.cycle)
        if len(self.pipeline) > MAX_PIPELINED:
            self.transport.abort()
        elif self.pipeline:
            self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell all requests of the connection that the client has left."""
        self.pipeline.clear()
        for cycle in self._unanswered:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)


def direct_writer(send: Send) -> Callable[[bytes], bool] | None:
    """Return a function that writes a piece of a body that has begun, as `send` does, but at once.

    It cannot wait for a slow client, so it returns whether there is room for more. None: this
    `send` is not uvicorn's own, or the body is not chunked.
    """
    cycle = getattr(send, "__self__", None)
    if type(cycle) is not RequestResponseCycle or not cycle.chunked_encoding:
        return None
    flow, transport = cycle.flow, cycle.transport

    def write(piece: bytes) -> bool:
        if cycle.disconnected:
            return False
        transport.write(b"%x\r\n%b\r\n" % (len(piece), piece))
        return not flow.write_paused

    return write


class ClientLeftError(Exception):
    """The client closed its connection before it had the whole answer."""


@contextmanager
def watching(receive: Receive) -> Iterator[None]:
    """Watch the client: when it leaves, what runs inside is cancelled.

    Raises:
        ClientLeftError: it has left.
    """
    task = asyncio.current_task()
    assert task is not None
    left = over = False

    def cancel_work(watcher: "asyncio.Task[None]") -> None:
        nonlocal left
        if not over and not watcher.cancelled():
            left = True
            task.cancel()

    watcher = asyncio.create_task(wait_until_left(receive))
    watcher.add_done_callback(cancel_work)
    try:
        yield
    finally:
        over = True
        watcher.cancel()
        if left:
            task.uncancel()
            raise ClientLeftError from None


async def wait_until_left(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(receive: Receive, limit: int) -> bytes:
    """Return the whole request body.

    Raises:
        ApiError: 413; it has more than `limit` bytes.
        ClientLeftError: the client left before it was here.
    """
    pieces: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        pieces.append(message.get("body", b""))
        size += len(pieces[-1])
        if size > limit:
            text = f"The request body is larger than {limit} bytes."
            raise ApiError(413, text, code="body_too_large")
        if not message.get("more_body", False):
            return pieces[0] if len(pieces) == 1 else b"".join(pieces)
