"""The gateway as one ASGI application: the life of a request, from its arrival to its log line.

A request that is passed on to a model server does not go through FastAPI, whose layers it would pay
for and not use; those that the gateway answers itself do (`serving.routes`).
"""

import asyncio
import gc
import logging
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from functools import partial

from fastapi import FastAPI
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from serving.client import (
    ClientLeftError,
    Watch,
    body_is_missing,
    cut_unread,
    did_not_read,
    read_body,
)
from serving.compare.handler import compare
from serving.compare.shadow import Shadow, Tap, with_token_ids
from serving.exchange import CLOSE, Exchange
from serving.large_bodies import LARGE_BODY
from serving.observability.gauges import StateGauges
from serving.observability.logging import log_requests
from serving.observability.metrics import CLIENT_LEFT
from serving.observability.tracing import tracer
from serving.openai.errors import ApiError
from serving.openai.request import read_request
from serving.routes import make_routes
from serving.state import GatewayState
from serving.upstream.proxy import Proxy

log = logging.getLogger("attnserve")

GENERATING = ("/v1/completions", "/v1/chat/completions")
COMPARE = "/v1/compare"

COUNTED_AFTER_SECONDS = 0.01
"""After which a request that has ended is counted and logged, with those that end meanwhile."""

Handler = Callable[[Exchange, bytes], Awaitable[None]]
"""Answers a request, whose body is the second argument."""


class App:
    """The whole gateway."""

    def __init__(self, state: GatewayState) -> None:
        self.state = state
        state.metrics.registry.register(StateGauges(state))
        self.tracer = tracer()
        self._finished: list[tuple[Exchange, float, float, int]] = []
        self.proxy = Proxy(state, self.tracer)
        self.shadow = Shadow(self.proxy)
        self.fastapi = make_routes(state, self._lifespan)
        self.handlers: dict[str, Handler] = {
            **dict.fromkeys((*GENERATING, "/v1/embeddings"), self._pass_on),
            COMPARE: partial(compare, self.proxy),
        }

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or run the lifespan."""
        if scope["type"] != "http":
            await self.fastapi(scope, receive, send)
            return
        path = scope["path"]
        if path.endswith("/"):  # a slash at the end of what is under a base URL changes nothing
            path = path.rstrip("/")
            if path in self.handlers or path == "/v1/models":
                scope = {**scope, "path": path}
        elif path == "/metrics":
            self._count_finished()
        exchange = Exchange.begin(scope, send)
        self.state.in_flight += 1
        try:
            if scope["method"] == "OPTIONS" and (preflight := self.state.access.preflight(scope)):
                await self._run_asgi(preflight, exchange, scope, receive)
            elif handler := self.handlers.get(scope["path"]):
                await self._run(handler, exchange, scope, receive)
            else:
                await self._run_asgi(self.fastapi, exchange, scope, receive)
        finally:
            self.state.in_flight -= 1

    async def _run(
        self, handler: Handler, exchange: Exchange, scope: Scope, receive: Receive
    ) -> None:
        """Answer a POST request past FastAPI, whatever happens, and count it.

        As soon as the client leaves, be it before, between or without streamed bytes, whatever is
        done for it is cancelled, which closes the connection to the model server, and vLLM aborts
        the request.
        """
        if self.tracer is not None:
            name = f"{scope['method']} {exchange.route}"
            exchange.span = self.tracer.start(name, exchange.headers)
        try:
            body = await self._read(exchange, scope, receive)
            with Watch(receive):
                await handler(exchange, body)
        except ClientLeftError:
            exchange.aborted = True
            exchange.status = exchange.status or CLIENT_LEFT
            if did_not_read(receive):
                exchange.code = "client_too_slow"
        except ApiError as error:
            await exchange.fail(error)
        except asyncio.CancelledError:
            await end(exchange, receive)
        except Exception:
            log.exception("the gateway failed", extra={"request_id": exchange.request_id})
            await exchange.fail(ApiError(500, "The gateway failed."))
        finally:
            self._finish(exchange)

    async def _read(self, exchange: Exchange, scope: Scope, receive: Receive) -> bytes:
        """Return the request's body, once its key is known to be good.

        Raises:
            ApiError: 400 a wrong host, or a header twice; 405 no POST; 401 no good key; 415 no
                JSON; 408 or 413 for the body.
        """
        state = self.state
        self._check(exchange)
        by_name = exchange.by_name
        if scope["method"] != "POST":
            message = f"Not allowed to {scope['method']} on {exchange.route}"
            raise ApiError(405, message, code="method_not_supported")
        if state.keys:
            exchange.account = state.keys.account(by_name.get(b"authorization", b""))
            exchange.account.running.add(asyncio.current_task())
            exchange.headers = [h for h in exchange.headers if h[0] != b"authorization"]
        # As vLLM does it: a web page can send anything else without asking first.
        if by_name.get(b"content-type", b"").lower().split(b";", 1)[0] != b"application/json":
            message = "Unsupported Media Type: Only 'application/json' is allowed"
            raise ApiError(415, message, code="unsupported_media_type")
        length = int(by_name.get(b"content-length", b"0"))
        limit = state.config.limits.max_body_bytes
        reading = read_body(receive, limit, length, partial(self._hold, exchange))
        if not body_is_missing(exchange.send):  # a timeout costs more than to take it
            body = await reading
        else:
            try:
                async with asyncio.timeout(state.config.timeouts.body):
                    body = await reading
            except TimeoutError:
                raise ApiError(408, "The request's body did not come in time.") from None
        exchange.stage = "queue"
        return body

    def _hold(self, exchange: Exchange, size: int) -> None:
        """Note that a request has so many more bytes in memory, until it ends.

        Raises:
            ApiError: 503; all requests together have too many.
        """
        exchange.held_bytes += size
        self.state.held_bytes += size
        if self.state.held_bytes > self.state.config.limits.max_held_bytes:
            message = "The gateway holds as many bytes of requests as it may."
            raise ApiError(503, message, code="too_many_bytes", retry_after=1.0)

    def _check(self, exchange: Exchange) -> None:
        """Let a request in by its headers."""
        access = self.state.access
        access.check(exchange.headers, exchange.by_name)
        exchange.cors = access.cors_headers(exchange.by_name.get(b"origin"))

    async def _pass_on(self, exchange: Exchange, raw: bytes) -> None:
        """Pass a request on to a model server, as it came."""
        config = self.state.config
        # A key's budget holds only if an answer cannot be longer than what is reserved for it.
        limited = exchange.account is not None and exchange.account.limits_answers
        chars = config.routing.prefix_chars
        request = await self.state.bodies.read(
            read_request, raw, exchange.route, config.limits, chars, limited
        )
        model = exchange.use_model(self.state.router, request.model)
        if request.padded_prompts:
            request.pad(model.context_length(request.model))
        prompt = request.prompt_tokens
        cost = model.entry.cost(prompt, request.tokens - prompt)
        await exchange.reserve(request.tokens, cost)
        small = len(raw) <= LARGE_BODY  # as all are that are short enough for shadow scoring
        shadow = config.shadow if small and exchange.route in GENERATING else None
        if shadow is None or not self.shadow.samples(shadow, request.model, raw):
            await self.proxy.forward(exchange, request)
            return
        request.body = with_token_ids(request.body)
        tap = Tap(exchange.send)
        exchange.send = tap.send
        await self.proxy.forward(exchange, request)
        self.shadow.offer(exchange, tap)

    def _finish(self, exchange: Exchange) -> None:
        """Settle a request that is over, and have it counted and logged a little later: the
        requests that come meanwhile go first."""
        self.state.held_bytes -= exchange.held_bytes
        seconds = time.perf_counter() - exchange.arrival
        tokens = exchange.settle()
        if exchange.account is not None:
            exchange.account.running.discard(asyncio.current_task())
        if not self._finished:
            asyncio.get_running_loop().call_later(COUNTED_AFTER_SECONDS, self._count_finished)
        self._finished.append((exchange, time.time(), seconds, tokens))

    def _count_finished(self) -> None:
        """Count and log the requests that have ended."""
        finished, self._finished = self._finished, []
        log_them = self.state.config.logging.requests and log.isEnabledFor(logging.INFO)
        lines = []
        for exchange, at, seconds, tokens in finished:
            if log_them or exchange.span is not None:
                fields = exchange.log_fields(seconds)
                lines.append((at, fields))
                if exchange.span is not None and self.tracer is not None:
                    self.tracer.end(exchange.span, fields, at)
            self._count(exchange, seconds, tokens)
        if log_them:
            log_requests(lines)

    def _count(self, exchange: Exchange, seconds: float, tokens: int) -> None:
        """Count a request by how it ended."""
        metrics, of_model = self.state.metrics, exchange.metrics
        labels = of_model.labels if of_model else ("", "", "")
        if of_model is None:
            metrics.requests.labels(exchange.route, *labels, str(exchange.status)).inc()
        else:
            of_model.requests(exchange.route, exchange.status).inc()
            of_model.duration.observe(seconds)
            if exchange.queued is not None:
                of_model.queue.observe(exchange.queued)
        if exchange.account is not None:
            metrics.key_requests.labels(exchange.account.name).inc()
            metrics.key_tokens.labels(exchange.account.name).inc(tokens)
        if exchange.aborted:
            metrics.aborts.labels(*labels, exchange.stage).inc()
        if exchange.code is not None:
            metrics.errors.labels(*labels, exchange.code).inc()

    async def _run_asgi(
        self, app: ASGIApp, exchange: Exchange, scope: Scope, receive: Receive
    ) -> None:
        """Answer a request by a route of FastAPI's, or a preflight; count it, and give it its
        id."""

        async def send(message: Message) -> None:
            if message["type"] == "http.response.start":
                exchange.status = message["status"]
                cors = exchange.cors if app is self.fastapi else []
                headers = [*message["headers"], exchange.id_header, *cors]
                if body_is_missing(exchange.send):
                    headers.append(CLOSE)
                message = {**message, "headers": headers}
            await exchange.send(message)

        try:
            self._check(exchange)
            await app(scope, receive, send)
        except ApiError as error:
            self.state.metrics.errors.labels("", "", "", error.code).inc()
            await exchange.fail(error)
        except asyncio.CancelledError:
            if exchange.status:
                raise
            await end(exchange, receive)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            status = str(exchange.status or CLIENT_LEFT)
            self.state.metrics.requests.labels(route, "", "", "", status).inc()

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        async with self.state:
            gc.collect()
            gc.freeze()  # what is here now stays: not to be visited in every collection
            yield
            self._count_finished()  # for the last page of a worker's metrics
        self._count_finished()  # what was cancelled at the end
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)


async def end(exchange: Exchange, receive: Receive) -> None:
    """Answer for a request whose task has been cancelled from outside; a client that does not read
    is cut off, as it would not read that either."""
    error = why_cancelled(exchange)
    if cut_unread(receive):
        exchange.code = error.code
    else:
        await exchange.fail(error)


def why_cancelled(exchange: Exchange) -> ApiError:
    """Return the error of a request whose task has been cancelled from outside."""
    if exchange.account is not None and exchange.account.revoked:
        return ApiError(401, "The API key has been revoked.", code="key_revoked")
    # uvicorn's, when a request is not done `timeouts.drain` seconds after SIGTERM.
    message = "The gateway is shutting down."
    return ApiError(503, message, code="shutting_down", retry_after=1.0)
