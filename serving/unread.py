"""A limit for the bytes of all answers that are here because their clients have not read them."""

import asyncio
import logging
import math
from typing import Protocol

log = logging.getLogger("attnserve")

PATIENCE_SECONDS = 1.0
"""At the limit, a client for which an answer has waited longer than this is cut off."""

LOG_SECONDS = 60.0
"""Between two lines of the log about it."""


class Client(Protocol):
    """A connection of a client, for which an answer waits."""

    def cut(self, reason: str) -> None:
        """End it at once; it has `remove`d itself then."""


class UnreadAnswers:
    """Whole answers on their way from a server, and what waits in the connections of clients."""

    def __init__(self) -> None:
        self.bytes = 0
        self._waiting: dict[Client, tuple[int, float]] = {}
        """What waits for each client, and since when; the longest first."""
        self._logged = -math.inf

    def add(self, client: Client, size: int, limit: int) -> None:
        """Note that so many bytes wait for a client now."""
        loop = asyncio.get_running_loop()
        self.remove(client)
        self._waiting[client] = size, loop.time()
        self.bytes += size
        if self.bytes > limit:  # only for now, if this is what a request has held until now
            loop.call_soon(self.make_room, limit)

    def remove(self, client: Client) -> None:
        """Note that a client has read what waited for it, or has left."""
        size, _ = self._waiting.pop(client, (0, 0.0))
        self.bytes -= size

    def make_room(self, limit: int) -> bool:
        """Cut off those that have not read for longest until the limit holds; return whether it
        does."""
        while self.bytes > limit:
            now = asyncio.get_running_loop().time()
            if now > self._logged + LOG_SECONDS:
                self._logged = now
                log.warning("clients do not read %d bytes of answers, the limit", limit)
            client, (_, since) = next(iter(self._waiting.items()), (None, (0, math.inf)))
            if client is None or now < since + PATIENCE_SECONDS:
                return False
            client.cut("unread")
        return True
