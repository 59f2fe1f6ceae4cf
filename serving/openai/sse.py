"""Server-sent events: cut a stream where events end, read its usage, and pass it on."""

import json
import re
import time
from typing import Any

from serving.client import direct_writer, hold_next
from serving.exchange import Exchange
from serving.observability.metrics import ModelMetrics
from serving.openai.errors import normalise
from serving.upstream.http import Connection, broken

END = re.compile(rb"\r?\n\r?\n")
MAX_EVENT_BYTES = 4 * 1024 * 1024
"""An unfinished event above this goes on as it is."""


class EventParser:
    """Cuts a stream into whole events, which can go on at once; nothing else is kept."""

    def __init__(self, hide_usage: bool) -> None:
        self.hide_usage = hide_usage
        self.count = 0
        """Events with tokens so far; the tokens of a stream that ends before its usage comes."""
        self.usage: tuple[int, int] | None = None
        self.error: dict[str, Any] | None = None
        """The event that was an error, in OpenAI's shape; it is the last that goes on."""
        self.error_status = 500
        """Its HTTP status, by vLLM's `code`."""
        self.rest = b""
        """The unfinished event."""
        self.last = b""
        """The last piece of whole events."""

    def feed(self, piece: bytes) -> tuple[bytes, bool]:
        """Return what can go on of all that has come, and whether there are tokens in it."""
        if self.rest:
            piece = self.rest + piece
            self.rest = b""
        if not piece.endswith(b"\n\n"):
            piece = self._cut(piece)
        if piece:
            self.last = piece
        # Names in the two events that are not tokens; one search each, for every piece.
        if b'"usage"' in piece or b'"error"' in piece:
            return self._read_events(piece)
        events = piece.count(b"data: {")
        self.count += events
        return piece, events > 0

    def _cut(self, piece: bytes) -> bytes:
        """Keep what comes after the last whole event."""
        lf, crlf = piece.rfind(b"\n\n"), piece.rfind(b"\r\n\r\n")
        end = max(lf + 2 if lf >= 0 else 0, crlf + 4 if crlf >= 0 else 0)
        if len(piece) - end > MAX_EVENT_BYTES:
            end = len(piece)
        self.rest = piece[end:]
        return piece[:end]

    def _read_events(self, piece: bytes) -> tuple[bytes, bool]:
        """Take events one by one: note usage, hide it if it was not asked for, reshape errors."""
        kept = []
        tokens = 0
        at = 0
        while at < len(piece):
            end = found.end() if (found := END.search(piece, at)) else len(piece)
            event = piece[at:end]
            at = end
            data = event_data(event)
            if data is None:
                kept.append(event)
                continue
            usage = data.get("usage")
            if isinstance(usage, dict):
                prompt = count(usage.get("prompt_tokens"))
                if prompt is not None:
                    self.usage = prompt, count(usage.get("completion_tokens")) or 0
                if data.get("choices") == []:
                    if not self.hide_usage:
                        kept.append(event)
                    continue
            if data.get("error") is not None or data.get("object") == "error":
                self.error_status = error_status(data.get("error", data))
                self.error = normalise(event_text(event), self.error_status)
                kept.append(b"data: %b\n\n" % json.dumps(self.error).encode())
                break
            tokens += 1
            kept.append(event)
        self.count += tokens
        return b"".join(kept), tokens > 0


class EventStream(EventParser):
    """The events of one answer on their way from a model server to the client."""

    def __init__(
        self, exchange: Exchange, metrics: ModelMetrics, connection: Connection, hide_usage: bool
    ) -> None:
        super().__init__(hide_usage)
        self.exchange = exchange
        self.metrics = metrics
        self.connection = connection
        self._last_token = 0.0

    async def begin(self) -> bytes:
        """Return the first whole events, or what is left where the stream ends before.

        Raises:
            UpstreamError: it breaks off before.
        """
        while piece := await self.connection.piece():
            if events := self._timed(piece):
                return events
        return self._end()

    async def pass_on(self, events: bytes) -> None:
        """Send the first events to the client, and all that follow, each as soon as it is whole;
        an error is the last of them.

        Raises:
            UpstreamError: the stream breaks off.
        """
        send, feed, clock = self.exchange.send, self.feed, time.perf_counter
        observe = self.metrics.itl.observe
        write = None

        def write_piece(piece: bytes) -> bool:
            """Do the same as the loop below, at once: nearly all tokens come this way."""
            events, has_tokens = feed(piece)
            if has_tokens:
                now = clock()
                observe(now - self._last_token)
                self._last_token = now
            return write(events) and self.error is None if write and events else True

        while True:
            if events:
                if self.connection.ended and not self.error:  # an error waits for a health check
                    hold_next(send)
                await send({"type": "http.response.body", "body": events, "more_body": True})
                if self._last_token and not self.error and (write := direct_writer(send)):
                    await self.connection.pour(write_piece)
            if self.error or not (piece := await self.connection.piece()):
                break
            events = self._timed(piece)

    async def end(self) -> None:
        """End the answer after its events.

        Raises:
            UpstreamError: the stream breaks off.
        """
        last = b"" if self.error else self._end()
        await self.exchange.send({"type": "http.response.body", "body": last, "more_body": False})

    def take_unread(self) -> bool:
        """Count what has come and has not gone on, where the client has left; return whether there
        may be more that nobody has seen, because the server had to wait for the client."""
        rest, more = self.connection.take_unread()
        if self.error is None and rest:
            self.feed(rest)
        return more and self.error is None

    def _end(self) -> bytes:
        """Return what is left to send where the stream has ended: nothing, or a last [DONE] without
        its empty line.

        Raises:
            UpstreamError: that was in the middle of an event, or, where the end of the connection
                is all that says so, before [DONE].
        """
        rest = self.rest.strip()
        done = (rest or self.last.rstrip()).endswith((b"data: [DONE]", b"data:[DONE]"))
        if (rest and not done) or not (done or self.connection.framed):
            raise broken()
        return b"data: [DONE]\n\n" if rest else b""

    def _timed(self, piece: bytes) -> bytes:
        """Return what can go on, and note when its tokens came."""
        events, has_tokens = self.feed(piece)
        if has_tokens:
            now = time.perf_counter()
            if self._last_token:
                self.metrics.itl.observe(now - self._last_token)
            else:
                self.exchange.first_token = now - self.exchange.arrival
                self.metrics.ttft.observe(self.exchange.first_token)
                self.exchange.stage = "mid_stream"
            self._last_token = now
        return events


def count(value: Any) -> int | None:
    """Return a number of tokens; None if it cannot be one."""
    return value if type(value) is int and 0 <= value < 10**12 else None


def error_status(error: Any) -> int:
    """Return the HTTP status that an event's error would have had as an answer, else 500."""
    code = error.get("code") if isinstance(error, dict) else None
    return code if type(code) is int and 400 <= code < 600 else 500


def event_text(event: bytes) -> bytes:
    """Return the data of an event."""
    return event.strip().removeprefix(b"data:").strip()


def event_data(event: bytes) -> dict[str, Any] | None:
    """Return the JSON object in an event; None if that is not what is in it."""
    data = event_text(event)
    if not data.startswith(b"{"):
        return None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
