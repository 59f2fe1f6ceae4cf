"""The connections to one server, which are kept for a while, and requests over them."""

import asyncio
import ssl
from collections import deque
from urllib.parse import urlsplit

from serving.upstream.http import Connection, Headers, UpstreamError, unreachable


class ConnectionPool:
    """The connections to one server. Idle ones are kept for `idle_seconds`, which must be less than
    the server keeps them (vLLM: 5 s)."""

    def __init__(self, url: str, idle_seconds: float, api_key: str | None = None) -> None:
        parts = urlsplit(url)
        assert parts.hostname is not None
        self.tls = ssl.create_default_context() if parts.scheme == "https" else None
        self.host = parts.hostname
        self.port = parts.port or (443 if self.tls else 80)
        self.netloc = parts.netloc.encode("ascii")
        self.idle_seconds = idle_seconds
        self.api_key = api_key
        """Of the server; it takes the place of a client's."""
        self._idle: deque[Connection] = deque()  # the longest idle first
        self._sweeper: asyncio.TimerHandle | None = None

    async def get(self, connect_timeout: float, fresh: bool = False) -> Connection:
        """Return a connection, a kept one if there is one and not `fresh`.

        Raises:
            UpstreamError: none could be made.
        """
        loop = asyncio.get_running_loop()
        oldest = loop.time() - self.idle_seconds
        while self._idle and not fresh:
            connection = self._idle.pop()
            if connection.idle_since > oldest and connection.check_open():
                return connection
            connection.close()
        try:
            async with asyncio.timeout(connect_timeout):
                _, made = await loop.create_connection(
                    lambda: Connection(loop), self.host, self.port, ssl=self.tls
                )
        except OSError:  # a TimeoutError is one, and so is an ssl.SSLError
            raise unreachable() from None
        return made

    async def send(
        self,
        method: str,
        target: str,
        headers: Headers,
        body: bytes,
        *,
        connect_timeout: float,
        read_timeout: float,
        total_timeout: float,
    ) -> Connection:
        """Send a request and return the connection once the answer's first bytes are here.

        A kept connection that the server was just closing costs nothing but a second, fresh one, if
        it is sure that the server has not read the request; a GET may be read twice. All times are
        in seconds; `put` or `close` has to follow.

        Raises:
            UpstreamError: the server failed the request; nothing of an answer had come.
        """
        start = f"{method} {target} HTTP/1.1\r\nhost: ".encode("ascii")
        lines = [b"%b%b\r\naccept-encoding: identity\r\n" % (start, self.netloc)]
        if self.api_key is not None:
            lines.append(b"authorization: Bearer %b\r\n" % self.api_key.encode("latin-1"))
            headers = [header for header in headers if header[0] != b"authorization"]
        lines += [b"%b: %b\r\n" % header for header in headers]
        data = b"".join((*lines, b"\r\n", body))
        for fresh in (False, True):
            connection = await self.get(connect_timeout, fresh)
            try:
                await connection.request(data, read_timeout, total_timeout)
                return connection
            except UpstreamError as error:
                connection.close()
                again = method == "GET" or not error.was_read
                if connection.uses == 1 or error.reason != "broken" or not again:
                    raise
            except BaseException:
                connection.close()
                raise
        raise AssertionError("a fresh connection has not been used before")

    def put(self, connection: Connection) -> None:
        """Give a connection back after an answer; one that is not at its end is closed."""
        if not connection.reusable:
            connection.close()
            return
        connection.answering = False
        loop = connection.loop
        connection.idle_since = loop.time()
        self._idle.append(connection)
        if self._sweeper is None:
            self._sweeper = loop.call_later(self.idle_seconds, self._sweep)

    def _sweep(self) -> None:
        """Close what has been idle too long; come again while something is kept."""
        self._sweeper = None
        while self._idle:
            first = self._idle[0]
            left = first.idle_since + self.idle_seconds - first.loop.time()
            if left > 0 and not first.lost:
                self._sweeper = first.loop.call_later(max(left, 0.05), self._sweep)
                return
            self._idle.popleft().close()

    def close(self) -> None:
        """Close the idle connections; those in use are closed when they are given back."""
        self.idle_seconds = 0.0
        while self._idle:
            self._idle.pop().close()
        if self._sweeper is not None:
            self._sweeper.cancel()
            self._sweeper = None
