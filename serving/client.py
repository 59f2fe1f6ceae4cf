"""The client's side of a request: its body, and whether it is still there."""

import asyncio
from types import TracebackType

from starlette.types import Receive

from serving.openai.errors import ApiError


class ClientLeftError(Exception):
    """The client closed its connection before it had the whole answer."""


class ClientWatch:
    """While in it, the client is watched: when it leaves, what runs in here is cancelled, and
    `ClientLeftError` comes out."""

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._left = self._over = False

    def __enter__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._watcher = asyncio.create_task(client_left(self._receive))
        self._watcher.add_done_callback(self._note)

    def _note(self, watcher: "asyncio.Task[None]") -> None:
        if not self._over and not watcher.cancelled():
            self._left = True
            self._task.cancel()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._over = True
        self._watcher.cancel()
        if self._left:
            self._task.uncancel()
            raise ClientLeftError from None


async def client_left(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def read_body(receive: Receive, limit: int) -> bytes:
    """The whole request body, at most `limit` bytes."""
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
