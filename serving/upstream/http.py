"""A connection to an HTTP/1.1 server: one request and answer at a time.

A general client does more for each streamed token than a gateway needs (`benchmarks.gateway` has
two proxies that use one, beside ours), and does not say what retrying has to know: whether the
server can have read a request whose connection broke.
"""

import asyncio
import socket
import sys
from collections.abc import Callable
from typing import cast

import httptools

Headers = list[tuple[bytes, bytes]]

BUFFER_BYTES = 256 * 1024
"""An answer that is not fetched is read ahead this far, then the server has to wait."""

MAX_HEAD_BYTES = 64 * 1024
"""Most that a server may send without a byte of a body: heads, trailers, chunks' extensions."""

ESTABLISHED = 1
"""The state of a TCP connection that neither side has closed (Linux: TCP_ESTABLISHED)."""

Sink = Callable[[bytes], bool]
"""Takes a piece of a body; returns whether it takes more now."""


class UpstreamError(Exception):
    """A model server failed a request.

    Attributes:
        status: for the client.
        reason: by which it is counted and logged.
        was_read: whether the server may have begun to work on the request.
    """

    def __init__(self, status: int, reason: str, message: str, was_read: bool = True) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason
        self.was_read = was_read

    @property
    def code(self) -> str:
        """What the client gets as the error's code."""
        return CODES.get(self.reason, f"upstream_{self.reason}")


CODES = {
    "crashed": "upstream_broken",  # for the client the same, for who runs the server not
    "overtime": "upstream_timeout",
    "slow_client": "client_too_slow",
}


def unreachable() -> UpstreamError:
    """Return the error where no connection could be made, so that the request was not sent."""
    return UpstreamError(503, "unreachable", "The model server cannot be reached.", False)


def broken(was_read: bool = True) -> UpstreamError:
    """Return the error where the connection ended before the answer, or what came is not HTTP."""
    return UpstreamError(502, "broken", "The model server broke off its answer.", was_read)


def unusable(what: str) -> UpstreamError:
    """Return the error where a server's answer is one that cannot be passed on."""
    return UpstreamError(502, "unusable", f"The model server's answer has {what}.")


def timed_out(reason: str = "timeout") -> UpstreamError:
    """Return the error where nothing came for too long; `overtime`: where the whole took too long,
    though something came; `slow_client`: where it was the client that did not take it."""
    return UpstreamError(504, reason, "The model server did not answer in time.")


class Connection(asyncio.Protocol):
    """One connection: `request`, then `piece` until it returns b"", then `put` it or `close`."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self.loop = loop
        self.parser = httptools.HttpResponseParser(self)
        self.transport: asyncio.Transport
        self.lost = False
        self.answering = False
        """Whether an answer is awaited or being fetched."""
        self.uses = 0
        self.idle_since = 0.0
        self._acknowledged = 0  # bytes, before the request; 0: not known
        self._waiter: asyncio.Future[None] | None = None
        self._timer: asyncio.TimerHandle | None = None
        self._sink: Sink | None = None
        self._clear()

    def _clear(self) -> None:
        self.status = 0
        self.headers: Headers = []
        self.keep = False
        self.framed = False  # the answer says where it ends; else it ends with the connection
        self._began = False  # a byte of the answer has come
        self._bodiless = 0  # bytes since the last of a body
        self._complete = False
        self._error: UpstreamError | None = None
        self._pieces: list[bytes] = []
        self._size = 0
        self._paused = False

    async def request(self, data: bytes, read_timeout: float, total_timeout: float) -> None:
        """Send a request and return when `status` and `headers` are here, and with them the first
        piece of the body if there is one.

        Args:
            data: the whole request, head and body.
            read_timeout: longest wait for the next byte, in seconds.
            total_timeout: longest time for request and answer, in seconds.

        Raises:
            UpstreamError: it failed.
        """
        self._clear()
        self.uses += 1
        if self.lost:
            raise unreachable()
        now = self.loop.time()
        self.answering = True
        self._read_timeout, self._last_read = read_timeout, now
        self._deadline = now + total_timeout
        self._watch_until(now + min(read_timeout, total_timeout))
        self.transport.write(data)
        while not (self._pieces or self._complete):
            await self._wait()

    async def piece(self) -> bytes:
        """Return what has come of the body since the last call, or comes next; b"" at its end."""
        while not self._pieces:
            if self._complete:
                return b""
            await self._wait()
        pieces = self._pieces
        piece = pieces[0] if len(pieces) == 1 else b"".join(pieces)
        self._pieces = []
        self._size = 0
        if self._paused:
            self._paused = False
            self._last_read = self.loop.time()
            self.transport.resume_reading()
        return piece

    def take_unread(self) -> tuple[bytes, bool]:
        """Return what has come and was not fetched, and whether the server had to wait with more,
        which it may have written meanwhile."""
        pieces, self._pieces = self._pieces, []
        return b"".join(pieces), self._paused

    async def pour(self, sink: Sink) -> None:
        """Hand what comes of the body to `sink` as it comes, without waking a task for it.

        Returns when the body's last bytes are here, or when `sink` takes no more; `piece` goes on
        from there.
        """
        self._sink = sink
        try:
            while self._sink is not None and not self._complete and not self._pieces:
                await self._wait()
        finally:
            self._sink = None

    async def rest(self, limit: int, hold: Callable[[int], None] | None = None) -> bytes:
        """Return all that is left of the body; `hold` is told of so many more bytes in memory.

        Raises:
            UpstreamError: it failed, or has more than `limit` bytes.
        """
        pieces = []
        while not self.ended:
            piece = await self.piece()
            pieces.append(piece)
            if hold is not None:
                hold(len(piece))
            limit -= len(piece)
            if limit < 0:
                raise unusable("too many bytes")
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def close(self) -> None:
        """End the connection at once; the server sees that its client has left."""
        self.answering = False
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        if not self.lost:
            self.transport.abort()

    @property
    def ended(self) -> bool:
        """Whether all of the answer has been fetched."""
        return self._complete and not self._pieces

    @property
    def reusable(self) -> bool:
        """Whether the answer is complete and the connection good for another request."""
        return self.ended and self.keep and not self.lost

    def _wait(self) -> asyncio.Future[None]:
        """Return a future that is done when something has happened.

        Raises:
            UpstreamError: it has, and it was a failure.
        """
        if self._error is not None:
            raise self._error
        self._waiter = self.loop.create_future()
        return self._waiter

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _fail(self, error: UpstreamError) -> None:
        if self._error is None and not self._complete:
            self._error = error
            self._wake()

    def _watch_until(self, due: float) -> None:
        """Have the connection's one timer fire no later than this; it is not set again with each
        request, but when it has fired."""
        if self._timer is not None:
            if self._timer.when() <= due:
                return
            self._timer.cancel()
        self._timer = self.loop.call_at(due, self._check_time)

    def _check_time(self) -> None:
        """Fail the request whose time is over, or come back when it may be.

        A server that has to wait for the client is not silent.
        """
        self._timer = None
        if not self.answering:
            return
        now = self.loop.time()
        last = now if self._paused else self._last_read
        due = min(last + self._read_timeout, self._deadline)
        if now < due:
            self._watch_until(due)
        elif self._paused:
            self._fail(timed_out("slow_client"))
        else:
            overtime = self._began and due == self._deadline
            self._fail(timed_out("overtime" if overtime else "timeout"))

    def tcp_state(self) -> tuple[bool, int]:
        """Return whether the server has not closed the connection, as far as the kernel knows, and
        how many bytes the server's kernel has acknowledged; 0: this kernel does not say."""
        if sys.platform != "linux":
            return True, 0
        # uvloop's own getsockopt is five times slower.
        file = self.transport.get_extra_info("socket").fileno()
        own = socket.SocketType(socket.AF_INET, socket.SOCK_STREAM, 0, file)
        try:
            info = own.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 128)
        except OSError:  # a sandbox that has no such option
            return True, 0
        finally:
            own.detach()
        return info[0] == ESTABLISHED, int.from_bytes(info[120:128], sys.byteorder)

    def check_open(self) -> bool:
        """Return whether a kept connection is still open, right before a request on it."""
        if self.lost:
            return False
        still_open, self._acknowledged = self.tcp_state()
        return still_open

    def _was_read(self, exc: Exception | None) -> bool:
        """Return whether the server may have read the request on a connection that has ended.

        It has not where its kernel closed the connection in order without acknowledging a byte of
        the request: it was closed before the request came. Of a reset nothing is known, which may
        have overtaken an acknowledgement, nor below TLS, whose socket is closed by now.
        """
        reset = isinstance(exc, ConnectionResetError)
        tls = self.transport.get_extra_info("sslcontext") is not None
        if self._began or reset or tls or not self._acknowledged:
            return True
        return self.tcp_state()[1] != self._acknowledged

    # asyncio.Protocol

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Keep the transport."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass of it

    def data_received(self, data: bytes) -> None:
        """Parse what has come, and wake who waits for it."""
        if not self.answering or self._complete:  # nothing was asked for
            self.transport.abort()
            return
        self._began = True
        self._last_read = self.loop.time()
        size = self._size
        try:
            self.parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade):
            self._refuse(broken())
            return
        has_body = self._size > size
        if has_body:
            self._bodiless = 0
        elif not self._complete:
            self._bodiless += len(data)
            if self._bodiless > MAX_HEAD_BYTES:
                self._refuse(unusable(f"a head of more than {MAX_HEAD_BYTES} bytes"))
                return
        if self._sink is not None and self._pieces and not self._complete:
            pieces, self._pieces, self._size = self._pieces, [], 0
            if self._sink(pieces[0] if len(pieces) == 1 else b"".join(pieces)):
                return
            self._sink = None
        if self._size > BUFFER_BYTES and not self._paused and not self._complete:
            self._paused = True
            self.transport.pause_reading()
        if has_body or self._complete:
            self._wake()

    def _refuse(self, error: UpstreamError) -> None:
        """End a connection on which something has come that cannot be used."""
        self.keep = False
        self._fail(error)
        self._wake()  # also for an answer that was complete before that
        self.transport.abort()

    def connection_lost(self, exc: Exception | None) -> None:
        """End the answer, if that is how it ends, or fail it."""
        self.lost = True
        if self.status and not self.framed and self._error is None and exc is None:
            self._complete = True
            self._wake()
        if self.answering and not self._complete:
            self._fail(broken(self._was_read(exc)))

    # httptools.HttpResponseParser

    def on_message_begin(self) -> None:
        """Refuse a second answer, for which nobody has asked."""
        if self._complete:
            raise broken()

    def on_header(self, name: bytes, value: bytes) -> None:
        """Keep one header of the answer, its name in lower case; trailers are dropped."""
        if self.status:
            return
        name = name.lower()
        if name == b"content-length":
            self.framed = True
        elif name == b"transfer-encoding" or name == b"content-encoding":
            self.framed = self.framed or name == b"transfer-encoding"
            if value.lower() not in (b"chunked", b"identity"):
                coding = value[:32].decode("latin-1")
                self._fail(unusable(f"the coding {coding}, which was not asked for"))
                raise broken()
        self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """Note the status; a 1xx is no answer yet."""
        status = self.parser.get_status_code()
        if not 100 <= status < 600:
            raise broken()
        if status < 200:
            self.headers = []
        else:
            self.status = status

    def on_body(self, body: bytes) -> None:
        """Keep a piece of the body."""
        self._pieces.append(body)
        self._size += len(body)

    def on_message_complete(self) -> None:
        """Note the end of the answer."""
        if self.status:
            self._complete = True
            self.keep = self.parser.should_keep_alive()
