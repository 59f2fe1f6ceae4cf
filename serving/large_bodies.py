"""Large bodies, of requests and of answers, are read in a process of their own.

Parsed, a body can take many times its bytes, in small objects. Python gives their memory back only
where none that lives on has come between them, and while other requests run, some always do. Nor
does a parser let go of the interpreter: every stream would wait for it.
"""

import asyncio
import logging
import signal
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from typing import Any, TypeVar

from serving.openai.errors import ApiError
from serving.openai.request import no_json
from serving.workers import end_with_parent

log = logging.getLogger("attnserve")

LARGE_BODY = 128 * 1024
"""A larger body, in bytes, is read by the other process."""

IDLE_SECONDS = 60.0
"""How long that process is kept without work: it has some 45 MB."""

T = TypeVar("T")


class BodyReader:
    """Reads bodies: small ones here, large ones in a process that starts with the first of them."""

    def __init__(self) -> None:
        self._pool: ProcessPoolExecutor | None = None
        self._reading = 0
        self._closer: asyncio.TimerHandle | None = None

    async def read(self, read: Callable[..., T], raw: bytes, *rest: Any) -> T:
        """Return `read(raw, *rest)`; where the body is large, all that is sent and comes back has
        to be picklable.

        Raises:
            ApiError: what `read` raises; 503, the other process has been killed; or 400, what it
                has read is nested too deeply.
        """
        if len(raw) <= LARGE_BODY:
            return read(raw, *rest)
        if self._closer is not None:
            self._closer.cancel()
        pool = self._pool = self._pool or ProcessPoolExecutor(1, get_context("spawn"), prepare)
        loop = asyncio.get_running_loop()
        self._reading += 1
        try:
            answer = await loop.run_in_executor(pool, answer_of, read, raw, *rest)
        except BrokenProcessPool:
            log.error("the process that reads large bodies was killed")
            if self._pool is pool:
                self.close()
            message = "The gateway could not read the body, try again."
            raise ApiError(503, message, code="body_not_read", retry_after=1.0) from None
        except RecursionError:  # it is nested too deeply to be sent from there, if not to be read
            raise no_json() from None
        finally:
            self._reading -= 1
            if not self._reading:
                self._closer = loop.call_later(IDLE_SECONDS, self.close)
        found = answer.pop()  # the list is part of a cycle, in which bodies would pile up
        if isinstance(found, ApiError):
            raise found
        return found

    def close(self) -> None:
        """End the other process, if there is one."""
        if self._closer is not None:
            self._closer.cancel()
        if self._pool is not None:
            self._pool.shutdown(wait=False, cancel_futures=True)
            self._pool = None


def prepare() -> None:
    """Have the process end when the gateway does, however that ends, and not before."""
    for number in (signal.SIGINT, signal.SIGHUP):  # which a terminal sends to all of a group
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def answer_of(read: Callable[..., T], raw: bytes, *rest: Any) -> list[T | ApiError]:
    """Return what `read` returns, or its error, in a list."""
    try:
        return [read(raw, *rest)]
    except ApiError as error:
        return [error]
