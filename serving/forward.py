"""Passing a request on to the upstream, and its answer back as it comes."""

import asyncio
import json
import re
import time
import uuid
from collections.abc import Mapping

import aiohttp
from starlette.datastructures import Headers
from starlette.responses import JSONResponse, Response
from starlette.types import Receive, Scope, Send

from serving.errors import error_body, kind_of, normalise
from serving.metrics import Metrics
from serving.upstream import Upstream, UpstreamError, failure

# Headers that belong to one connection (RFC 9110, 7.6.1), or that each side writes for itself.
CONNECTION_HEADERS = frozenset(
    {
        "connection",
        "content-length",
        "keep-alive",
        "proxy-authenticate",
        "proxy-authorization",
        "proxy-connection",
        "te",
        "trailer",
        "transfer-encoding",
        "upgrade",
    }
)
NOT_SENT_UP = CONNECTION_HEADERS | {"host", "expect", "accept-encoding", "x-request-id"}
NOT_SENT_DOWN = CONNECTION_HEADERS | {"date", "server", "x-request-id"}

REQUEST_ID = re.compile(r"[\x21-\x7e]{1,128}")


class ClientLeftError(Exception):
    """The client closed its connection before it had the whole answer."""


class BodyTooLargeError(Exception):
    """The request's body is larger than the gateway takes."""


class Forward(Response):
    """A response whose content is the upstream's answer to the same request.

    It is written against ASGI itself, because what matters happens between `receive` and `send`:
    as soon as the client leaves, be it before, between or without streamed bytes, the upstream's
    connection is closed, which makes vLLM abort the request.
    """

    def __init__(self, upstream: Upstream, metrics: Metrics) -> None:
        super().__init__()
        self.upstream = upstream
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Relay until the answer ends or the client leaves, whichever is first."""
        headers = Headers(scope=scope)
        self.request_id = request_id(headers)
        try:
            body = await read_body(receive, self.upstream.settings.max_body_bytes)
            relay = asyncio.ensure_future(self._relay(scope, headers, body, receive, send))
            gone = asyncio.ensure_future(client_left(receive))
            try:
                await asyncio.wait((relay, gone), return_when=asyncio.FIRST_COMPLETED)
                if not relay.done():
                    raise ClientLeftError
                await relay
            finally:
                relay.cancel()
                gone.cancel()
                await asyncio.gather(relay, gone, return_exceptions=True)
        except ClientLeftError:
            self.metrics.disconnects.labels(scope["path"]).inc()
        except BodyTooLargeError as error:
            await self._fail(413, str(error), "body_too_large", scope, receive, send)
        except UpstreamError as error:
            self.metrics.upstream_errors.labels(error.reason).inc()
            await self._fail(
                error.status, str(error), f"upstream_{error.reason}", scope, receive, send
            )

    async def _relay(
        self, scope: Scope, headers: Headers, body: bytes, receive: Receive, send: Send
    ) -> None:
        """Send the request up and the answer down."""
        target = scope["path"]
        if scope["query_string"]:
            target += "?" + scope["query_string"].decode("latin-1")
        upward = {k: v for k, v in headers.items() if k not in NOT_SENT_UP}
        upward["x-request-id"] = self.request_id
        answer = await self.upstream.send(scope["method"], target, upward, body)
        async with answer:
            if answer.content_type == "text/event-stream":
                await self._stream(scope, answer, send)
            else:
                await self._whole(answer, scope, receive, send)

    async def _whole(
        self, answer: aiohttp.ClientResponse, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """An answer in one piece; errors are brought into OpenAI's shape."""
        try:
            content = await answer.read()
        except (aiohttp.ClientError, TimeoutError) as error:
            raise failure(error) from error
        headers = self._downward(answer.headers)
        if answer.status >= 400:
            content = normalise(content, answer.status)
            headers["content-type"] = "application/json"
        await Response(content, answer.status, headers)(scope, receive, send)

    async def _stream(self, scope: Scope, answer: aiohttp.ClientResponse, send: Send) -> None:
        """Server-sent events, each piece as it comes: nothing is kept, nothing waits."""
        headers = self._downward(answer.headers)
        headers |= {"cache-control": "no-cache", "x-accel-buffering": "no"}
        raw = [(k.encode("latin-1"), v.encode("latin-1")) for k, v in headers.items()]
        await send({"type": "http.response.start", "status": answer.status, "headers": raw})
        waiting = True
        try:
            async for piece in answer.content.iter_any():
                if waiting:
                    waiting = False
                    elapsed = time.perf_counter() - scope["attnserve.arrival"]
                    self.metrics.ttft.labels(scope["path"]).observe(elapsed)
                await send({"type": "http.response.body", "body": piece, "more_body": True})
        except (aiohttp.ClientError, TimeoutError) as error:
            broken = failure(error)
            self.metrics.upstream_errors.labels(broken.reason).inc()
            event = error_body(str(broken), "server_error", f"upstream_{broken.reason}")
            # Blank line first: what came last may have been half an event.
            last = f"\n\ndata: {json.dumps(event)}\n\n".encode()
            await send({"type": "http.response.body", "body": last, "more_body": True})
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    def _downward(self, headers: Mapping[str, str]) -> dict[str, str]:
        """The upstream's headers that the client gets, and the request's id."""
        kept = {k.lower(): v for k, v in headers.items() if k.lower() not in NOT_SENT_DOWN}
        return kept | {"x-request-id": self.request_id}

    async def _fail(
        self, status: int, message: str, code: str, scope: Scope, receive: Receive, send: Send
    ) -> None:
        """An error of the gateway's own."""
        headers = {"x-request-id": self.request_id}
        if status == 503:
            headers["retry-after"] = "1"
        content = error_body(message, kind_of(status), code)
        await JSONResponse(content, status, headers)(scope, receive, send)


def request_id(headers: Headers) -> str:
    """The client's X-Request-Id where it has a usable one, else a new one."""
    given = headers.get("x-request-id", "")
    return given if REQUEST_ID.fullmatch(given) else uuid.uuid4().hex


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
            raise BodyTooLargeError(f"The request body is larger than {limit} bytes.")
        if not message.get("more_body", False):
            return b"".join(pieces)


async def client_left(receive: Receive) -> None:
    """Return when the client has closed its connection."""
    while (await receive())["type"] != "http.disconnect":
        pass
