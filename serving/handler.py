"""What every route past FastAPI has in common: written against ASGI itself, no framework.

What matters happens between `receive` and `send`: as soon as the client leaves, be it before,
between or without streamed bytes, whatever is done for it is cancelled, which closes the upstream's
connection, and vLLM aborts the request.
"""

import asyncio
import json
import logging
import time
from abc import ABC, abstractmethod

from starlette.types import Receive, Scope, Send

from serving.call import Call
from serving.client import ClientLeftError, ClientWatch, read_body
from serving.observability.metrics import CLIENT_LEFT
from serving.observability.tracing import Tracer
from serving.openai.errors import ApiError, retry_headers
from serving.openai.response import JSON, end_with_error, whole
from serving.state import Gateway
from serving.upstream.http import UpstreamError
from serving.upstream.proxy import Forward, UnavailableError

log = logging.getLogger("attnserve")


class Route(ABC):
    """An ASGI application for POST requests; `respond` is what they are about."""

    def __init__(self, gateway: Gateway, tracer: Tracer | None) -> None:
        self.gateway = gateway
        self.tracer = tracer
        self.forward = Forward(gateway, tracer)

    @abstractmethod
    async def respond(self, call: Call, raw: bytes, scope: Scope, send: Send) -> None:
        """Answer a request whose key is good and whose body is `raw`.

        Raises:
            ApiError, UpstreamError: why there is no answer; the client is told.
        """

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, whatever happens, and count it."""
        call = Call(scope)
        if self.tracer is not None:
            call.span = self.tracer.start(f"{scope['method']} {call.route}", call.headers)
        self.gateway.in_flight += 1
        try:
            await self._answer(call, scope, receive, send)
        finally:
            self.gateway.in_flight -= 1
            self._note(call)

    async def _answer(self, call: Call, scope: Scope, receive: Receive, send: Send) -> None:
        """Pass the request on, or say why not."""
        try:
            raw = await self._body(call, scope, receive)
            with ClientWatch(receive):
                await self.respond(call, raw, scope, send)
        except ClientLeftError:
            call.aborted = True
            call.status = call.status or CLIENT_LEFT
        except ApiError as error:
            call.code = error.code
            await self._refuse(call, error, send)
        except UpstreamError as error:
            if isinstance(error, UnavailableError):
                headers = retry_headers(1.0) if error.status == 503 else []
                await whole(call, error.status, [JSON, *headers], error.body, send)
                return
            code = f"upstream_{error.reason}"
            api_error = ApiError(error.status, str(error), code=code, retry_after=1.0)
            await self._refuse(call, api_error, send)
        except asyncio.CancelledError:
            # uvicorn's, when a request is not done `timeouts.drain` seconds after SIGTERM.
            message = "The gateway is shutting down."
            ending = ApiError(503, message, code="shutting_down", retry_after=1.0)
            await self._refuse(call, ending, send)
        except Exception:
            log.exception("the gateway failed", extra={"request_id": call.request_id.decode()})
            await self._refuse(call, ApiError(500, "The gateway failed."), send)

    async def _body(self, call: Call, scope: Scope, receive: Receive) -> bytes:
        """The request's body, once its key is known to be good."""
        config = self.gateway.config
        if scope["method"] != "POST":
            message = f"Not allowed to {scope['method']} on {call.route}"
            raise ApiError(405, message, code="method_not_supported")
        call.account = self.gateway.keys.account(call.authorization)
        try:
            async with asyncio.timeout(config.timeouts.body):
                raw = await read_body(receive, config.limits.max_body_bytes)
        except TimeoutError:
            raise ApiError(408, "The request's body did not come in time.") from None
        call.stage = "queue"
        return raw

    async def _refuse(self, call: Call, error: ApiError, send: Send) -> None:
        """An error of the gateway's own."""
        call.code = error.code
        if call.status:
            await end_with_error(call, error, send)
        else:
            body = json.dumps(error.body).encode()
            await whole(call, error.status, [JSON, *error.headers()], body, send)

    def _note(self, call: Call) -> None:
        """Settle, count and log a request that is over."""
        metrics = self.gateway.metrics
        seconds = time.perf_counter() - call.arrival
        prompt_tokens = completion_tokens = 0
        for part in call.parts or (call,):
            prompt, completion = part.used()
            prompt_tokens += prompt
            completion_tokens += completion
            if part.counts is not None:
                part.counts.prompt_tokens.inc(prompt)
                part.counts.completion_tokens.inc(completion)
        call.prompt_tokens, call.completion_tokens = prompt_tokens, completion_tokens
        tokens = prompt_tokens + completion_tokens
        if call.account is not None:
            metrics.key_requests.labels(call.account.name).inc()
            if call.reserved is not None:
                call.account.settle(call.reserved, tokens)
                metrics.key_tokens.labels(call.account.name).inc(tokens)
        counts = call.counts
        labels = counts.labels if counts else ("", "", "")
        metrics.requests.labels(call.route, *labels, str(call.status)).inc()
        if counts is not None:
            if call.queued is not None:
                counts.queue.observe(call.queued)
            counts.duration.observe(seconds)
        if call.aborted:
            metrics.aborts.labels(*labels, call.stage).inc()
        if call.code is not None:
            metrics.errors.labels(*labels, call.code).inc()
        log_it = self.gateway.config.logging.requests and log.isEnabledFor(logging.INFO)
        if log_it or call.span is not None:
            fields = call.fields(seconds)
            if log_it:
                log.info("request", extra=fields)
            if call.span is not None and self.tracer is not None:
                self.tracer.end(call.span, fields)
