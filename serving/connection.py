"""The HTTP connections of clients, with the limits that uvicorn's own have not."""

import asyncio
import json
import logging
import math
import resource
from collections.abc import Callable, Iterable
from typing import Any

import httptools
from uvicorn.protocols.http.httptools_impl import (
    STATUS_LINE,
    HttpToolsProtocol,
    RequestResponseCycle,
)

from serving.openai.errors import ApiError
from serving.state import GatewayState
from serving.upstream.http import BUFFER_BYTES

log = logging.getLogger("attnserve")

MAX_PIPELINED = 16
"""Requests that may wait on one connection for the one before; with more, it is closed."""

MAX_PIPELINED_BYTES = 64 * 1024
"""Of their heads and bodies; with more, it is closed after the answer that they wait for."""

MAX_HEAD_BYTES = 64 * 1024
"""Of a request's URL, headers and trailers together, each of which counts 32 bytes more (as in
HTTP/2), because it is an object; and of what comes without being any of these, or of a body."""

MAX_HEADS_BYTES = 64 * 1024 * 1024
"""Of the heads of all clients that have begun and not ended."""

MAX_UNCOUNTED_BYTES = 16 * 1024
"""Of answers that one client has not read and that do not count as such yet."""

GRACE_SECONDS = 5.0
"""How long a client may go on sending after an answer that did not wait for all of its request
(closed at once, its connection would lose the answer); and how much later than `timeouts.total` a
client that reads is cut off, so that it can be told."""

RESERVE = 32
"""Connections beyond the limit, on which only /health is answered."""

SILENT_SECONDS = 1.0
"""At the limit, a connection without a request for longer than this gives way to a new one."""


class Clients:
    """What the connections of all clients share."""

    def __init__(self, state: GatewayState) -> None:
        self.state = state
        self.silent: dict[Protocol, float] = {}
        """Connections without a request, and since when; the longest silent first."""
        self.head_bytes = 0  # of heads that have not ended
        self._logged = -math.inf

    @property
    def limit(self) -> int:
        """How many connections there may be; each needs a second descriptor, to its server."""
        descriptors, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        return self.state.config.limits.max_connections or max(descriptors // 2 - 2 * RESERVE, 1)

    def make_room(self, now: float) -> bool:
        """Cut off the connection that has been silent longest; return whether there was one."""
        if now > self._logged + 60:
            self._logged = now
            log.warning("clients have as many connections as they may: %d", self.limit)
        oldest = next(iter(self.silent), None)
        if oldest is None or now < self.silent[oldest] + SILENT_SECONDS:
            return False
        oldest.cut("limit")
        return True


class Closer:
    """The transport as uvicorn sees it: with another `close`, and with bytes that wait for those
    behind them, which saves a system call and a packet."""

    def __init__(self, transport: asyncio.Transport, close: Callable[[], None]) -> None:
        self.write: Callable[[bytes], None] = transport.write
        self.is_closing = transport.is_closing
        self._write, self._close = transport.write, close
        self._held = b""
        self.not_reading = False
        self.on_leaving: dict[RequestResponseCycle, Callable[[], None]] = {}
        """What is called when the client of a request leaves."""

    def hold_next(self) -> None:
        """Have what is written next wait for what is written then."""
        self.write = self._hold

    def _hold(self, data: bytes) -> None:
        self._held, self.write = self._held + data, self._release

    def _release(self, data: bytes) -> None:
        data, self._held, self.write = self._held + data, b"", self._write
        self.write(data)

    def close(self) -> None:
        """Close the connection, or have it be closed once the client has sent its request."""
        if self._held:
            self._release(b"")
        self._close()


class CycleWithoutChunks(RequestResponseCycle):
    """One request of a client that knows no chunks (HTTP/1.0): an answer whose length is not known
    ends with its connection. uvicorn's own would be chunked all the same."""

    async def send(self, message: Any) -> None:
        """Send a message of the answer."""
        if message["type"] == "http.response.start":
            names = [name.lower() for name, _ in message["headers"]]
            self.chunked_encoding = None if b"content-length" in names else False
            self.unframed = self.chunked_encoding is False
        elif self.unframed:
            self.expected_content_length = len(message.get("body", b""))  # which is checked
        await super().send(message)


class Protocol(HttpToolsProtocol):
    """One connection of a client to uvicorn, with limits of size and time that uvicorn has not.

    One timer watches it, and is set again when it has fired, not with each request. What it looks
    at is in `_check_time`.

    A client may send a request before the one before it is answered. uvicorn then stops reading
    from its connection, so it does not see that the client leaves, and tells it only to the request
    that came last, which has not begun. The one that runs would go on in vLLM to its end.
    """

    def __init__(self, clients: Clients, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.clients = clients
        self.over_limit = False
        self._unanswered: list[RequestResponseCycle] = []
        self._waiting_bytes: dict[RequestResponseCycle, int] = {}  # of those in `pipeline`
        self._in_head = False  # of a request
        self._head_bytes = 0  # of the URL, headers and trailers so far
        self._unused_bytes = 0  # that came since the last head or piece of a body
        self._held_bytes = 0  # of them, in the sum of all clients
        self._deaf = False  # it is about to close; what comes is dropped
        self._timer: asyncio.TimerHandle | None = None
        self._due = 0.0  # for what is expected of a client without a request
        self._deadline = math.inf  # of the request that is answered, and for reading its answer
        self._backlog: float = math.inf  # bytes that the client has not read
        self._backlog_due = math.inf

    # The connection

    def connection_made(  # type: ignore[override]  # as uvicorn's own does
        self, transport: asyncio.Transport
    ) -> None:
        """Take a new connection, if there is room."""
        super().connection_made(transport)
        self._closer = Closer(transport, self._close)
        transport.set_write_buffer_limits(MAX_UNCOUNTED_BYTES)
        now = self.loop.time()
        excess = len(self.connections) - self.clients.limit
        if excess > 0 and not self.clients.make_room(now):
            self.over_limit = True
            if excess > RESERVE:
                self.cut("limit")
                return
        self._wait(self.clients.state.config.timeouts.head)

    def connection_lost(self, exc: Exception | None) -> None:
        """Tell all requests of the connection that the client has left."""
        self.clients.silent.pop(self, None)
        self.clients.state.unread.remove(self)
        self._hold(0)
        if self._timer is not None:
            self._timer.cancel()
        self._give_up(self._unanswered)
        super().connection_lost(exc)

    def cut(self, reason: str) -> None:
        """End the connection at once."""
        self._closer.not_reading = self.flow.write_paused
        self.clients.state.metrics.connections_cut.labels(reason).inc()
        self.clients.silent.pop(self, None)
        self.clients.state.unread.remove(self)
        self.transport.abort()

    def _close(self) -> None:
        """Close the connection after an answer; but let the client send all of its request first,
        for a while: what comes for a closed connection has the answer dropped that is on its way.
        """
        self._give_up(self._unanswered)
        if not self._deaf and not self.cycle.more_body:
            self.transport.close()
        elif not self.transport.is_closing():
            self.transport.write_eof()
            self.flow.resume_reading()
        self._deaf = True
        self._wait(GRACE_SECONDS)

    def _give_up(self, cycles: Iterable[RequestResponseCycle]) -> None:
        """Have requests end as if their client had left."""
        self.pipeline.clear()
        for cycle in cycles:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.waiting_for_100_continue = False
                cycle.message_event.set()
                if on_leaving := self._closer.on_leaving.get(cycle):
                    on_leaving()

    def _refuse(self, error: ApiError) -> None:
        """Answer what cannot become a request, and close; a request before it is answered first."""
        self._deaf = True
        self.clients.state.metrics.errors.labels("", "", "", error.code).inc()
        running = [cycle for cycle in self._unanswered if not cycle.response_complete]
        if running and (running[0].response_started or not running[0].more_body):
            running[0].keep_alive = False
            self._give_up(running[1:])
            for cycle in running[1:]:
                self._forget(cycle)
            return
        body = json.dumps(error.body).encode()
        fields = [(b"content-type", b"application/json"), (b"content-length", b"%d" % len(body))]
        fields += [*self.server_state.default_headers, *error.headers(), (b"connection", b"close")]
        head = b"".join(b"%b: %b\r\n" % field for field in fields)
        self.transport.write(b"%b%b\r\n%b" % (STATUS_LINE[error.status], head, body))
        self._close()

    # Time

    @property
    def _answering(self) -> bool:
        return any(not (c.response_complete or c.disconnected) for c in self._unanswered)

    def _wait(self, seconds: float) -> None:
        """Give the client so much time for what it does next; it has no request that runs."""
        now = self.loop.time()
        self._due = now + seconds
        self._watch_until(self._due)
        self.clients.silent.setdefault(self, now)

    def _watch_until(self, due: float) -> None:
        """Have the timer fire no later than this."""
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = self.loop.call_at(due, self._check_time)

    def _check_time(self) -> None:
        """Cut the connection off if its time is over, else come back when it may be."""
        self._timer = None
        now = self.loop.time()
        backlog = self.transport.get_write_buffer_size()
        if backlog and (self.flow.write_paused or not self._answering):  # nothing is added to it
            if backlog < self._backlog:
                self._backlog = backlog
                self._backlog_due = now + self.clients.state.config.timeouts.send
            due = min(self._backlog_due, self._deadline)
            reason = "total" if now >= self._deadline else "not_reading"
        elif self._answering:
            due = self._deadline + GRACE_SECONDS
            reason = "total"
        else:
            due = self._due
            reason = ""
        if now < due:
            self._watch_until(due)
        elif reason:
            self.cut(reason)
        elif self._in_head and not self._deaf:
            self._refuse(ApiError(408, "No whole head came in time.", code="head_timeout"))
        else:
            self.transport.close()

    def pause_writing(self) -> None:
        """Watch whether the client reads what is there for it."""
        super().pause_writing()
        state = self.clients.state
        self._backlog = self.transport.get_write_buffer_size()
        self._backlog_due = self.loop.time() + state.config.timeouts.send
        self._watch_until(self._backlog_due)
        # What is read ahead from a server counts, too.
        state.unread.add(self, self._backlog + BUFFER_BYTES, state.config.limits.max_unread_bytes)

    def resume_writing(self) -> None:
        """Note that the client has read nearly all that was there."""
        super().resume_writing()
        self.clients.state.unread.remove(self)

    # A request

    def data_received(self, data: bytes) -> None:
        """Parse what has come. An upgrade to another protocol is ignored."""
        if self._deaf:
            return
        was_in_head = self._in_head
        self._unused_bytes += len(data)
        try:
            while data:
                try:
                    self.parser.feed_data(data)
                    break
                except httptools.HttpParserUpgrade as upgrade:
                    data = self._head_without_upgrade() + data[upgrade.args[0] :]
            if self._unused_bytes > MAX_HEAD_BYTES:
                raise too_large()
            self._hold(max(self._unused_bytes, self._head_bytes) if self._in_head else 0)
        except httptools.HttpParserError as error:
            cause = error.__context__
            not_http = ApiError(400, "This is not HTTP/1.1.", code="invalid_http")
            self._refuse(cause if isinstance(cause, ApiError) else not_http)
        except ApiError as error:
            self._refuse(error)
        else:
            if self._in_head and not was_in_head and not self._answering:
                self._wait(self.clients.state.config.timeouts.head)

    def _hold(self, size: int) -> None:
        """Have so many bytes of a head that has not ended in the sum of all clients.

        Raises:
            ApiError: 503; these are too many.
        """
        self.clients.head_bytes += size - self._held_bytes
        self._held_bytes = size
        if size and self.clients.head_bytes > MAX_HEADS_BYTES:
            self._hold(0)
            message = "The gateway waits for the ends of too many heads."
            raise ApiError(503, message, code="too_many_connections", retry_after=1.0)

    def _head_without_upgrade(self) -> bytes:
        """Return the head of a request whose client would like another protocol, as if it did not.

        The parser takes what follows such a head for that protocol, not for a body.

        Raises:
            ApiError: 405; it asks for a tunnel.
        """
        method, version = self.parser.get_method(), self.parser.get_http_version().encode()
        if method == b"CONNECT":
            raise ApiError(405, "This is no proxy.", code="method_not_supported")
        lines = [b"%b: %b\r\n" % header for header in self.headers if header[0] != b"upgrade"]
        return b"%b %b HTTP/%b\r\n%b\r\n" % (method, self.url, version, b"".join(lines))

    def on_message_begin(self) -> None:
        """Begin a head."""
        super().on_message_begin()
        self._in_head = True
        self._head_bytes = 0

    def on_url(self, url: bytes) -> None:
        """Keep a piece of the URL."""
        self._head_bytes += len(url)
        if self._head_bytes > MAX_HEAD_BYTES:
            raise too_large()
        super().on_url(url)

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep a header; what comes behind the body, a trailer, is dropped."""
        self._head_bytes += len(name) + len(value) + 32
        if self._head_bytes > MAX_HEAD_BYTES:
            raise too_large()
        if self._in_head:  # as uvicorn's own, which is called for each header
            name = name.lower()
            if name == b"expect" and value.lower() == b"100-continue":
                self.expect_100_continue = True
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Begin a request."""
        if self.parser.should_upgrade():
            return
        self._in_head = False
        self._unused_bytes = 0
        if self.over_limit and self.url != b"/health":
            message = "The gateway has as many connections as it may."
            raise ApiError(503, message, code="too_many_connections", retry_after=1.0)
        super().on_headers_complete()
        # No Transport, but all of one that uvicorn's cycle uses.
        self.cycle.transport = self._closer  # type: ignore[assignment]
        self.cycle.keep_alive &= not self.over_limit
        if self.parser.get_http_version() == "1.0":
            self.cycle.__class__ = CycleWithoutChunks
        self._unanswered.append(self.cycle)
        if not self.pipeline:
            self._begin_answer()
        elif len(self.pipeline) > MAX_PIPELINED:
            self.transport.abort()
        else:
            self._wait_behind(self._head_bytes)
            self.flow.resume_reading()

    def _begin_answer(self) -> None:
        self.clients.silent.pop(self, None)
        self._backlog = math.inf
        self._deadline = self.loop.time() + self.clients.state.config.timeouts.total
        self._watch_until(self._deadline)

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body."""
        self._unused_bytes = 0
        if self.pipeline:
            self._wait_behind(len(body))
        super().on_body(body)

    def _wait_behind(self, size: int) -> None:
        """Note that so much more of the last request waits for the one before it to be answered.

        Raises:
            ApiError: it is too much with what waits already.
        """
        waiting = self._waiting_bytes
        waiting[self.cycle] = waiting.get(self.cycle, 0) + size
        if sum(waiting.values()) > MAX_PIPELINED_BYTES:
            raise ApiError(503, "Too much waits behind a request.", code="too_many_bytes")

    def on_message_complete(self) -> None:
        """Note the end of the request."""
        if not self._in_head:  # else it comes once more, without its upgrade
            super().on_message_complete()

    def on_response_complete(self) -> None:
        """Begin with the next request, or wait for one."""
        self.server_state.total_requests += 1
        for cycle in self._unanswered:
            if cycle.response_complete:
                self._forget(cycle)
        if self._deaf or self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            cycle, app = self.pipeline.pop()
            self._waiting_bytes.pop(cycle, None)
            self._start_asgi_task(cycle, app)
            self._begin_answer()
        elif self.cycle.more_body:
            self._close()
        else:
            timeouts = self.clients.state.config.timeouts
            self._wait(timeouts.head if self._in_head else timeouts.keep_alive)

    def _forget(self, cycle: RequestResponseCycle) -> None:
        """Let go of what a request has sent: its connection may be idle for long."""
        self._unanswered = [other for other in self._unanswered if other is not cycle]
        self._waiting_bytes.pop(cycle, None)
        cycle.body, cycle.scope = bytearray(), {}  # type: ignore[typeddict-item]  # none reads it
        if cycle is self.cycle and not self._in_head:
            self.url, self.headers, self.scope = b"", [], cycle.scope

    def _should_upgrade(self) -> bool:
        return False


def too_large() -> ApiError:
    """Return the error for too large a head."""
    message = f"URL, headers and trailers are larger than {MAX_HEAD_BYTES} bytes."
    return ApiError(431, message, code="head_too_large")
