"""HTTP/1.1 towards clients: uvicorn's, which loses sight of a client that pipelines.

A client may send a request before the one before it is answered. uvicorn then stops reading from
its connection, so it does not see that the client leaves, and tells it only to the request that
came last, which has not begun. The one that runs would go on in vLLM to its end.
"""

from collections.abc import Callable
from typing import Any

from starlette.types import Send
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

MOST_WAITING = 16
"""Requests that wait on one connection for the one before; with more, it is closed."""


class Protocol(HttpToolsProtocol):
    """One connection; every request on it hears when the client has left."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._unanswered: list[RequestResponseCycle] = []

    def on_headers_complete(self) -> None:
        """A request has begun."""
        super().on_headers_complete()
        self._unanswered = [cycle for cycle in self._unanswered if not cycle.response_complete]
        if self.cycle is not None:
            self._unanswered.append(self.cycle)
        if len(self.pipeline) > MOST_WAITING:
            self.transport.abort()
        elif self.pipeline:
            self.flow.resume_reading()

    def connection_lost(self, exc: Exception | None) -> None:
        """The client has left."""
        self.pipeline.clear()
        for cycle in self._unanswered:
            if not cycle.response_complete:
                cycle.disconnected = True
                cycle.message_event.set()
        super().connection_lost(exc)


def direct(send: Send) -> Callable[[bytes], bool] | None:
    """What writes some of a body that has begun, as `send` does, but at once: it cannot wait for a
    slow client, so it says whether there is room for more. None: this `send` has no such way."""
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
