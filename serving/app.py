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
from starlette.types import Message, Receive, Scope, Send

from serving.client import ClientLeftError, read_body, watching
from serving.compare.handler import compare
from serving.compare.shadow import Shadow, Tap, with_token_ids
from serving.exchange import Exchange
from serving.observability.gauges import StateGauges
from serving.observability.metrics import CLIENT_LEFT
from serving.observability.tracing import tracer
from serving.openai.errors import ApiError
from serving.openai.request import LARGE_BODY, beside_the_loop, read_request
from serving.routes import make_routes
from serving.state import GatewayState
from serving.upstream.proxy import Proxy

log = logging.getLogger("attnserve")

GENERATING = ("/v1/completions", "/v1/chat/completions")
COMPARE = "/v1/compare"

Handler = Callable[[Exchange, bytes], Awaitable[None]]
"""Answers a request, whose body is the second argument."""


class App:
    """The whole gateway."""

    def __init__(self, state: GatewayState) -> None:
        self.state = state
        state.metrics.registry.register(StateGauges(state))
        self.tracer = tracer()
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
        exchange = Exchange.begin(scope, send)
        self.state.in_flight += 1
        try:
            if handler := self.handlers.get(scope["path"]):
                await self._run(handler, exchange, scope, receive)
            else:
                await self._run_fastapi(exchange, scope, receive)
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
            with watching(receive):
                await handler(exchange, body)
        except ClientLeftError:
            exchange.aborted = True
            exchange.status = exchange.status or CLIENT_LEFT
        except ApiError as error:
            await exchange.fail(error)
        except asyncio.CancelledError:
            # uvicorn's, when a request is not done `timeouts.drain` seconds after SIGTERM.
            message = "The gateway is shutting down."
            await exchange.fail(ApiError(503, message, code="shutting_down", retry_after=1.0))
        except Exception:
            log.exception("the gateway failed", extra={"request_id": exchange.request_id})
            await exchange.fail(ApiError(500, "The gateway failed."))
        finally:
            self._finish(exchange)

    async def _read(self, exchange: Exchange, scope: Scope, receive: Receive) -> bytes:
        """Return the request's body, once its key is known to be good.

        Raises:
            ApiError: 405 no POST; 401 no good key; 408 or 413 for the body.
        """
        state = self.state
        if scope["method"] != "POST":
            message = f"Not allowed to {scope['method']} on {exchange.route}"
            raise ApiError(405, message, code="method_not_supported")
        if state.keys:
            exchange.account = state.keys.account(dict(exchange.headers).get(b"authorization", b""))
            exchange.headers = [h for h in exchange.headers if h[0] != b"authorization"]
        try:
            async with asyncio.timeout(state.config.timeouts.body):
                body = await read_body(receive, state.config.limits.max_body_bytes)
        except TimeoutError:
            raise ApiError(408, "The request's body did not come in time.") from None
        exchange.stage = "queue"
        return body

    async def _pass_on(self, exchange: Exchange, raw: bytes) -> None:
        """Pass a request on to a model server, as it came."""
        config = self.state.config
        # A key's budget holds only if an answer cannot be longer than what is reserved for it.
        limited = exchange.account is not None and exchange.account.limits_tokens
        request = await beside_the_loop(
            read_request,
            raw,
            exchange.route,
            config.limits,
            config.routing.prefix_chars,
            limited,
        )
        exchange.use_model(self.state.router, request.model)
        exchange.reserve(request.tokens)
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
        """Settle, count and log a request that is over."""
        seconds = time.perf_counter() - exchange.arrival
        tokens = exchange.settle()
        log_it = self.state.config.logging.requests and log.isEnabledFor(logging.INFO)
        if log_it or exchange.span is not None:
            fields = exchange.log_fields(seconds)
            if log_it:
                log.info("request", extra=fields)
            if exchange.span is not None and self.tracer is not None:
                self.tracer.end(exchange.span, fields)
        self._count(exchange, seconds, tokens)

    def _count(self, exchange: Exchange, seconds: float, tokens: int) -> None:
        """Count a request by how it ended."""
        metrics, of_model = self.state.metrics, exchange.metrics
        labels = of_model.labels if of_model else ("", "", "")
        metrics.requests.labels(exchange.route, *labels, str(exchange.status)).inc()
        if of_model is not None:
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

    async def _run_fastapi(self, exchange: Exchange, scope: Scope, receive: Receive) -> None:
        """Answer a request by a route of FastAPI's; count it, and give it its id."""
        status = CLIENT_LEFT

        async def send(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                headers = [*message["headers"], exchange.id_header]
                message = {**message, "headers": headers}
            await exchange.send(message)

        try:
            await self.fastapi(scope, receive, send)
        finally:
            route = getattr(scope.get("route"), "path", "unmatched")
            self.state.metrics.requests.labels(route, "", "", "", str(status)).inc()

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        async with self.state:
            gc.collect()
            gc.freeze()  # what is here now stays: not to be visited in every collection
            yield
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)
