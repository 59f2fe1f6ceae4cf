"""HTTP/1.1 towards clients: uvicorn's, which loses sight of a client that pipelines.

A client may send a request before the one before it is answered. uvicorn then stops reading from
its connection, so it does not see that the client leaves, and tells it only to the request that
came last, which has not begun. The one that runs would go on in vLLM to its end.
"""

from typing import Any

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
