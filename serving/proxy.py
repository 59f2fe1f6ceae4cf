"""The routes that are passed on to a model server: written against ASGI itself, no framework.

What matters happens between `receive` and `send`: as soon as the client leaves, be it before,
between or without streamed bytes, the upstream's connection is closed, which makes vLLM abort the
request. Nothing is sent to the client before the first bytes of an answer's body are here, so until
then another replica can take the request over.
"""

import asyncio
import json
import logging
import time
from types import TracebackType

from starlette.types import Receive, Scope, Send

from serving.call import Call
from serving.connection import Connection, Headers, UpstreamError
from serving.errors import ApiError, normalise, retry_headers
from serving.events import Events, usage_of
from serving.gateway import Gateway
from serving.metrics import CLIENT_LEFT, ModelMetrics
from serving.replica import Replica, Turn, send_request
from serving.request import Request
from serving.tracing import Tracer

log = logging.getLogger("attnserve")

ROUTES = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/embeddings"})

# Headers that belong to one connection (RFC 9110, 7.6.1), or that each side writes for itself.
CONNECTION_HEADERS = frozenset(
    {
        b"connection",
        b"content-length",
        b"keep-alive",
        b"proxy-authenticate",
        b"proxy-authorization",
        b"proxy-connection",
        b"te",
        b"trailer",
        b"transfer-encoding",
        b"upgrade",
    }
)
NOT_SENT_UP = CONNECTION_HEADERS | {
    b"host", b"expect", b"accept-encoding", b"content-type", b"cookie", b"x-request-id",
}  # fmt: skip
NOT_SENT_DOWN = CONNECTION_HEADERS | {b"date", b"server", b"set-cookie", b"x-request-id"}

JSON = (b"content-type", b"application/json")
NO_BUFFERING = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class ClientLeftError(Exception):
    """The client closed its connection before it had the whole answer."""


class UnavailableError(UpstreamError):
    """A 502 or 503 of the upstream's own; `body` is in OpenAI's shape."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status, "unavailable", "The model server is not available.")
        self.body = body


class Proxy:
    """An ASGI application for ROUTES."""

    def __init__(self, gateway: Gateway, tracer: Tracer | None) -> None:
        self.gateway = gateway
        self.tracer = tracer

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
            request = await self._read(call, scope, receive)
            with ClientWatch(receive):
                await self._pass_on(call, request, scope, send)
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

    async def _read(self, call: Call, scope: Scope, receive: Receive) -> Request:
        """The request, once its key and its body are known to be good."""
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
        request = Request(raw, config.limits, config.routing.prefix_chars)
        call.model = self.gateway.model(request.model)
        call.counts = self.gateway.counts(call.model, request.model)
        call.model_name = request.model
        return request

    async def _pass_on(self, call: Call, request: Request, scope: Scope, send: Send) -> None:
        """Send the request to a replica, and to another while nothing of an answer has come."""
        gateway = self.gateway
        assert call.model is not None and call.counts is not None
        if call.account is not None:
            call.account.reserve(request.tokens)
            call.reserved = request.tokens
        began = time.perf_counter()
        turn = await gateway.queue.turn(gateway.model, request.model, request.prefix)
        call.queued = time.perf_counter() - began
        call.counts.queue.observe(call.queued)
        call.prompt_tokens = request.prompt_tokens
        call.stage = "before_first_token" if request.stream else "whole"
        tried = {turn.replica}
        while True:
            call.replica = turn.replica.url
            try:
                connection = await self._attempt(call, request, turn, scope, send)
                turn.replica.pool.put(connection)
                return
            except UpstreamError as error:
                turn.failed()
                labels = call.counts.labels
                gateway.metrics.upstream_errors.labels(*labels, error.reason).inc()
                following = self._another(call, error, tried)
                if following is None:
                    raise
                gateway.metrics.retries.labels(*labels, error.reason).inc()
                call.retries += 1
            finally:
                turn.end()
                gateway.queue.wake()
            turn = following.begin()
            tried.add(following)

    def _another(self, call: Call, error: UpstreamError, tried: set[Replica]) -> Replica | None:
        """Where to try again; None if it is too late or of no use."""
        if call.status or error.reason == "timeout" or call.retries >= self._retries():
            return None
        model = self.gateway.model(call.model_name)
        usable = model.usable(tried)
        return model.choose(usable, b"") if usable else None

    def _retries(self) -> int:
        return self.gateway.config.routing.retries

    async def _attempt(
        self, call: Call, request: Request, turn: Turn, scope: Scope, send: Send
    ) -> Connection:
        """Send the request to one replica, and its answer to the client.

        Raises:
            UpstreamError: the replica failed; if `call.status` is 0, nothing has been sent.
        """
        replica = turn.replica
        head = self._head(call, replica, scope, len(request.body))
        left = replica.config.timeouts.total - (time.perf_counter() - call.arrival)
        connection = await send_request(replica, head, request.body, max(left, 0.001))
        try:
            if connection.status in (502, 503):
                body = normalise(await connection.rest(), connection.status)
                raise UnavailableError(connection.status, body)
            if is_event_stream(connection.headers):
                await self._stream(call, request, connection, turn, send)
            else:
                await self._whole(call, connection, turn, send)
        except BaseException:
            connection.close()
            raise
        return connection

    def _head(self, call: Call, replica: Replica, scope: Scope, length: int) -> bytes:
        """The head of the request to the upstream."""
        own_key = bool(self.gateway.keys) or replica.api_key is not None
        headers = [
            (name, value)
            for name, value in call.headers
            if name not in NOT_SENT_UP and not (own_key and name == b"authorization")
        ]
        if call.span is not None and self.tracer is not None:
            told = self.tracer.headers(call.span)
            headers = [(n, v) for n, v in headers if n not in told] + list(told.items())
        target = call.route
        if scope["query_string"]:
            target += "?" + scope["query_string"].decode("latin-1")
        headers += [call.id_header, JSON, (b"content-length", b"%d" % length)]
        return replica.head("POST", target, headers)

    async def _whole(self, call: Call, connection: Connection, turn: Turn, send: Send) -> None:
        """An answer in one piece; errors are brought into OpenAI's shape."""
        content = await connection.rest()
        turn.succeeded()
        status = connection.status
        headers = downward(connection.headers)
        if status >= 400:
            content = normalise(content, status)
            headers = [(n, v) for n, v in headers if n != b"content-type"] + [JSON]
            if status == 429 and not any(n == b"retry-after" for n, _ in headers):
                headers += retry_headers(1.0)
        else:
            self._known(call)
            if usage := usage_of(content):
                call.prompt_tokens, call.completion_tokens = usage
                call.usage_known = True
        await whole(call, status, headers, content, send)

    async def _stream(
        self, call: Call, request: Request, connection: Connection, turn: Turn, send: Send
    ) -> None:
        """Server-sent events, each as soon as it is whole."""
        counts = self._known(call)
        events = Events(request.hide_usage)
        observe = counts.itl.observe
        clock = time.perf_counter
        last = 0.0
        try:
            while piece := await connection.piece():
                out, has_tokens = events.feed(piece)
                if has_tokens:
                    now = clock()
                    if last:
                        observe(now - last)
                    else:
                        turn.succeeded()
                        call.first_token = now - call.arrival
                        counts.ttft.observe(call.first_token)
                        call.stage = "mid_stream"
                    last = now
                if out:
                    if not call.status:
                        await self._start_stream(call, connection, send)
                    await send({"type": "http.response.body", "body": out, "more_body": True})
            rest = events.left()
            if not call.status:
                await self._start_stream(call, connection, send)
            await send({"type": "http.response.body", "body": rest, "more_body": False})
        except UpstreamError as error:
            if not call.status:
                raise
            turn.failed()
            code = f"upstream_{error.reason}"
            self.gateway.metrics.upstream_errors.labels(*counts.labels, error.reason).inc()
            await end_with_error(call, ApiError(error.status, str(error), code=code), send)
        finally:
            call.completion_tokens = events.count
            if events.usage is not None:
                call.prompt_tokens, call.completion_tokens = events.usage
                call.usage_known = True

    async def _start_stream(self, call: Call, connection: Connection, send: Send) -> None:
        call.status = connection.status
        headers = downward(connection.headers)
        headers = [(n, v) for n, v in headers if n not in (b"cache-control", b"x-accel-buffering")]
        headers += [call.id_header, *NO_BUFFERING]
        if call.account is not None:
            headers += call.account.headers()
        await send({"type": "http.response.start", "status": call.status, "headers": headers})

    def _known(self, call: Call) -> ModelMetrics:
        """The metrics of a model that a server has answered for."""
        assert call.model is not None
        call.counts = self.gateway.known(call.model, call.model_name)
        return call.counts

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
        answered = call.usage_known or (
            call.replica is not None and (call.aborted or call.first_token)
        )
        if not answered:
            call.prompt_tokens = call.completion_tokens = 0
        tokens = call.prompt_tokens + call.completion_tokens
        if call.account is not None:
            metrics.key_requests.labels(call.account.name).inc()
            if call.reserved is not None:
                call.account.settle(call.reserved, tokens)
                metrics.key_tokens.labels(call.account.name).inc(tokens)
        counts = call.counts
        labels = counts.labels if counts else ("", "", "")
        metrics.requests.labels(call.route, *labels, str(call.status)).inc()
        if counts is not None:
            counts.duration.observe(seconds)
            counts.prompt_tokens.inc(call.prompt_tokens)
            counts.completion_tokens.inc(call.completion_tokens)
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


async def whole(call: Call, status: int, headers: Headers, content: bytes, send: Send) -> None:
    """Send an answer in one piece."""
    call.status = status
    extra = [call.id_header, (b"content-length", b"%d" % len(content))]
    if call.account is not None:
        extra += call.account.headers()
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *extra]})
    await send({"type": "http.response.body", "body": content, "more_body": False})


async def end_with_error(call: Call, error: ApiError, send: Send) -> None:
    """End a stream that has begun with an event that says why, and without [DONE]."""
    call.code = error.code
    last = b"data: %b\n\n" % json.dumps(error.body).encode()
    await send({"type": "http.response.body", "body": last, "more_body": False})


def downward(headers: Headers) -> Headers:
    """The upstream's headers that the client gets."""
    return [(name, value) for name, value in headers if name not in NOT_SENT_DOWN]


def is_event_stream(headers: Headers) -> bool:
    """Whether an answer is streamed."""
    return any(n == b"content-type" and v.startswith(b"text/event-stream") for n, v in headers)
