"""The connection to one vLLM server."""

import logging
from collections.abc import Mapping
from types import TracebackType
from typing import Self

import aiohttp
from yarl import URL

from serving.settings import Settings

log = logging.getLogger("attnserve")

IDLE_SECONDS = 4.0
"""How long an idle connection is kept. vLLM closes its side after 5 s: a request sent just then is
lost, so ours must go first."""


class UpstreamError(Exception):
    """The upstream failed a request: what to tell the client, and the reason to count."""

    def __init__(self, status: int, reason: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.reason = reason


class Upstream:
    """A pool of connections to one vLLM server; use as an async context manager."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    async def __aenter__(self) -> Self:
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=IDLE_SECONDS),
            timeout=aiohttp.ClientTimeout(
                total=None,
                sock_connect=self.settings.connect_seconds,
                sock_read=self.settings.silence_seconds,
            ),
            auto_decompress=False,
            cookie_jar=aiohttp.DummyCookieJar(),
            skip_auto_headers=("User-Agent", "Accept", "Accept-Encoding", "Content-Type"),
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        await self._session.close()

    async def send(
        self, method: str, target: str, headers: Mapping[str, str], body: bytes
    ) -> aiohttp.ClientResponse:
        """Send a request and return the answer once its headers are here.

        A kept connection that the upstream was just closing fails before any byte of an answer:
        that, and nothing else, is tried once more.
        """
        url = URL(self.settings.upstream_url + target, encoded=True)
        for last_try in (False, True):
            try:
                return await self._session.request(
                    method, url, headers=headers, data=body or None, allow_redirects=False
                )
            except (aiohttp.ClientError, TimeoutError) as error:
                if last_try or not lost_connection(error):
                    raise failure(error) from error
                log.info("the upstream closed a kept connection; trying once more")
        raise AssertionError("the loop returns or raises")

    async def healthy(self) -> bool:
        """Whether the upstream says that it can answer."""
        timeout = aiohttp.ClientTimeout(total=self.settings.health_seconds)
        url = self.settings.upstream_url + "/health"
        try:
            async with self._session.get(url, timeout=timeout) as response:
                return response.status == 200
        except (aiohttp.ClientError, OSError):  # a TimeoutError is an OSError
            return False


def lost_connection(error: Exception) -> bool:
    """Whether an established connection broke, as against refused, timed out or misused ones."""
    return isinstance(
        error, aiohttp.ServerDisconnectedError | aiohttp.ClientOSError
    ) and not isinstance(error, aiohttp.ClientConnectorError)


def failure(error: Exception) -> UpstreamError:
    """What a client library's exception means to the gateway's client."""
    if isinstance(error, TimeoutError):
        return UpstreamError(504, "timeout", "The model server did not answer in time.")
    if isinstance(error, aiohttp.ClientConnectorError):
        return UpstreamError(503, "unreachable", "The model server cannot be reached.")
    return UpstreamError(502, "broken", "The model server broke off its answer.")
