"""The client of a request: its body, whether it is still there, and ways to write to it."""

import asyncio
import re
from collections.abc import Callable
from typing import Any

from starlette.types import Receive, Send
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, RequestResponseCycle

from serving.connection import Closer
from serving.openai.errors import ApiError
from serving.upstream.http import Headers

NO_HEAD = re.compile(rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]|\r(?!\n)")
"""What no head has."""


def did_not_read(receive: Receive) -> bool:
    """Return whether a client that has left was cut off, because it did not read."""
    closer = getattr(getattr(receive, "__self__", None), "transport", None)
    return isinstance(closer, Closer) and closer.not_reading


def cut_unread(receive: Receive) -> bool:
    """Cut a client off that does not read what was sent to it; return whether it is such a one."""
    cycle = getattr(receive, "__self__", None)
    if not isinstance(cycle, RequestResponseCycle) or not cycle.flow.write_paused:
        return False
    cycle.on_response.__self__.cut("ended")  # type: ignore[attr-defined]  # the Protocol's method
    return True


def body_is_missing(send: Send) -> bool:
    """Return whether a part of the body of the request that `send` answers has not come yet."""
    cycle = getattr(send, "__self__", None)
    return isinstance(cycle, RequestResponseCycle) and cycle.more_body


def hold_next(send: Send) -> None:
    """Have what is sent next (a head, the last events) wait for what is sent right after it."""
    cycle: Any = getattr(send, "__self__", None)
    closer = getattr(cycle, "transport", None)
    if isinstance(closer, Closer) and cycle.scope["method"] != "HEAD":  # after its head comes none
        closer.hold_next()


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


def write_answer(send: Send, status: int, headers: Headers, content: bytes) -> bool:
    """Write a whole answer, as `send` does in two steps, at once; `headers` have its length.

    Returns whether it has: not where this `send` is not uvicorn's own, or has to wait for the
    client.
    """
    cycle = getattr(send, "__self__", None)
    if type(cycle) is not RequestResponseCycle or cycle.flow.write_paused or cycle.more_body:
        return False
    if cycle.disconnected:
        return True
    if cycle.scope["method"] == "HEAD":
        content = b""
    headers = [*cycle.default_headers, *headers]
    if not cycle.keep_alive:
        headers.append((b"connection", b"close"))
    head = b"".join([b"%b: %b\r\n" % header for header in headers])
    if NO_HEAD.search(head) or head.count(b"\n") != len(headers):
        raise ValueError("a header of an answer has characters that none may have")
    cycle.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[status], head, content))
    cycle.waiting_for_100_continue = False
    cycle.response_started = cycle.response_complete = True
    cycle.message_event.set()
    if not cycle.keep_alive:
        cycle.transport.close()
    cycle.on_response()
    return True


class ClientLeftError(Exception):
    """The client closed its connection before it had the whole answer."""


class Watch:
    """A context that is cancelled when the client leaves, without a task that waits for that.

    Raises:
        ClientLeftError: it has left.
    """

    def __init__(self, receive: Receive) -> None:
        method: Any = receive  # of uvicorn's request, whose transport is a `Closer`
        self._cycle = method.__self__
        self._left = False

    def _cancel(self) -> None:
        if not self._left:
            self._left = True
            self._task.cancel()

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._cycle.flow.resume_reading()
        self._cycle.transport.on_leaving[self._cycle] = self._cancel
        if self._cycle.disconnected:  # before anything was done for it
            self._cancel()

    def __exit__(self, *_: object) -> None:
        del self._cycle.transport.on_leaving[self._cycle]
        if self._left:
            self._task.uncancel()
            raise ClientLeftError from None


async def read_body(
    receive: Receive, limit: int, length: int, hold: Callable[[int], None]
) -> bytes:
    """Return the whole request body.

    Args:
        receive: has it.
        limit: most bytes that it may have.
        length: what the client says that it has, or 0.
        hold: is told of so many more bytes in memory, and may raise an ApiError.

    Raises:
        ApiError: 413; it has more than `limit` bytes.
        ClientLeftError: the client left before it was here.
    """
    cycle: Any = receive.__self__  # type: ignore[attr-defined]  # uvicorn's request
    body = bytearray()
    if not (cycle.more_body or cycle.disconnected) and len(cycle.body) <= limit:
        body, cycle.body = cycle.body, body  # all of it is here: no message is needed for it
        hold(len(body))
        return bytes(body)
    while length <= limit:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError
        piece: bytes = message.get("body", b"")
        hold(len(piece))
        length = max(length, len(body) + len(piece))
        if not message.get("more_body", False) and length <= limit:
            return b"".join((body, piece)) if body else piece
        body += piece
    raise ApiError(413, f"The request body is larger than {limit} bytes.", code="body_too_large")
