"""The way of a request to a replica, to another if that one fails, and of the answer back.

Nothing is sent to the client before the first bytes of an answer's body are here, so until then
another replica can take the request over.
"""

import json
import time

from serving.exchange import JSON, Exchange
from serving.observability.metrics import ModelMetrics
from serving.observability.tracing import Tracer
from serving.openai.errors import ApiError, normalise, retry_headers
from serving.openai.request import ModelRequest
from serving.openai.response import usage_of, without_nulls
from serving.openai.sse import EventStream
from serving.state import GatewayState
from serving.upstream.http import Connection, Headers, UpstreamError
from serving.upstream.replica import Attempt, Replica

# Headers that belong to one connection (RFC 9110, 7.6.1), or that each side writes for itself.
CONNECTION_HEADERS = frozenset(
    b"connection content-length keep-alive proxy-authenticate proxy-authorization proxy-connection "
    b"te trailer transfer-encoding upgrade".split()
)
NOT_SENT_UP = CONNECTION_HEADERS.union(
    b"host expect accept-encoding content-type cookie origin x-request-id".split()
)
NOT_SENT_DOWN = CONNECTION_HEADERS.union(
    b"date server set-cookie x-request-id access-control-allow-origin "
    b"access-control-allow-credentials access-control-expose-headers".split()
)

NO_BUFFERING = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class UnavailableError(UpstreamError):
    """A 502 or 503 of the upstream's own, or the 500 of one that is dying."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status, "unavailable", "The model server is not available.")
        self.body = body


class Proxy:
    """Passes requests on to the model servers."""

    def __init__(self, state: GatewayState, tracer: Tracer | None) -> None:
        self.state = state
        self.tracer = tracer

    async def forward(self, exchange: Exchange, request: ModelRequest) -> None:
        """Send a request to a replica, and its answer to the client.

        Another replica is asked where one fails, while nothing has been sent to the client.

        Args:
            exchange: has its model; its route, query and headers are sent; what becomes known is
                added.
            request: what is sent.

        Raises:
            ApiError: there is no room for it, or the replicas that were tried have failed.
        """
        router, metrics = self.state.router, self.state.metrics
        assert exchange.model is not None and exchange.metrics is not None
        began = time.perf_counter()
        attempt = await router.attempt(exchange.model, request.model, request.prefix)
        exchange.queued = time.perf_counter() - began
        exchange.prompt_tokens = request.prompt_tokens
        exchange.stage = "before_first_token" if request.stream else "whole"
        tried = {attempt.replica}
        while True:
            exchange.replica = attempt.replica.url
            try:
                await self._send(exchange, request, attempt)
                return
            except UpstreamError as error:
                attempt.failed()
                labels = exchange.metrics.labels
                metrics.upstream_errors.labels(*labels, error.reason).inc()
                following = self._another(exchange, error, tried)
                if following is None:
                    raise api_error(error) from None
                metrics.retries.labels(*labels, error.reason).inc()
                exchange.retries += 1
            finally:
                attempt.end()
                router.wake()
            attempt = Attempt(following)
            tried.add(following)

    def _another(
        self, exchange: Exchange, error: UpstreamError, tried: set[Replica]
    ) -> Replica | None:
        """Return where to try again; None if it is too late or of no use."""
        if exchange.status or error.reason == "timeout":
            return None
        if exchange.retries >= self.state.config.routing.retries:
            return None
        model = self.state.router.model(exchange.model_name)
        usable = model.usable(tried)
        return model.choose(usable, b"") if usable else None

    async def _send(self, exchange: Exchange, request: ModelRequest, attempt: Attempt) -> None:
        """Send the request to one replica, and its answer to the client.

        Raises:
            UpstreamError: the replica failed; if `exchange.status` is 0, nothing has been sent.
        """
        replica = attempt.replica
        timeouts = replica.config.timeouts
        left = timeouts.total - (time.perf_counter() - exchange.arrival)
        connection = await replica.pool.send(
            "POST",
            exchange.route + (f"?{exchange.query.decode('latin-1')}" if exchange.query else ""),
            self._headers_up(exchange, len(request.body)),
            request.body,
            connect_timeout=timeouts.connect,
            read_timeout=timeouts.read,
            total_timeout=max(left, 0.001),
        )
        try:
            if connection.status < 500 and is_event_stream(connection.headers):
                await self._stream(exchange, request, connection, attempt)
            else:
                content = await connection.rest()
                await self._whole(exchange, connection, connection.status, content, attempt)
        except BaseException:
            connection.close()
            raise
        replica.pool.put(connection)

    def _headers_up(self, exchange: Exchange, length: int) -> Headers:
        """Return the headers of the request to a model server."""
        headers = [header for header in exchange.headers if header[0] not in NOT_SENT_UP]
        if exchange.span is not None and self.tracer is not None:
            own = self.tracer.headers(exchange.span)
            headers = [(n, v) for n, v in headers if n not in own] + list(own.items())
        return [*headers, exchange.id_header, JSON, (b"content-length", b"%d" % length)]

    async def _whole(
        self,
        exchange: Exchange,
        connection: Connection,
        status: int,
        content: bytes,
        attempt: Attempt,
    ) -> None:
        """Send an answer in one piece; errors are brought into OpenAI's shape.

        Raises:
            UnavailableError: it is one that another replica may not give.
        """
        if status in (502, 503) or (status == 500 and not await attempt.replica.is_healthy()):
            raise UnavailableError(status, content)
        attempt.succeeded()
        headers = headers_down(connection.headers)
        if status >= 400:
            content = json.dumps(normalise(content, status)).encode()
            headers = [(n, v) for n, v in headers if n != b"content-type"] + [JSON]
            if status == 429 and not any(n == b"retry-after" for n, _ in headers):
                headers += retry_headers(1.0)
        else:
            metrics_of_answer(exchange)
            content = without_nulls(content)
            exchange.note_usage(usage_of(content))
        await exchange.answer(status, headers, content)

    async def _stream(
        self, exchange: Exchange, request: ModelRequest, connection: Connection, attempt: Attempt
    ) -> None:
        """Send server-sent events, each as soon as it is whole."""
        stream = EventStream(exchange, metrics_of_answer(exchange), connection, request.hide_usage)
        try:
            events = await stream.begin()
            if stream.error and not stream.count:
                # vLLM's head says 200 before it looks at all of the request.
                content = json.dumps(stream.error).encode()
                await connection.rest()
                await self._whole(exchange, connection, stream.error_status, content, attempt)
                return
            attempt.succeeded()
            headers = headers_down(connection.headers)
            headers = [header for header in headers if header[0] not in dict(NO_BUFFERING)]
            await exchange.start(connection.status, headers + NO_BUFFERING)
            await stream.pass_on(events)
        finally:
            exchange.completion_tokens = request.tokens_of(stream.count)
            exchange.note_usage(stream.usage)


def metrics_of_answer(exchange: Exchange) -> ModelMetrics:
    """Return the metrics of a model for which a server has answered, by which it is counted."""
    assert exchange.model is not None and exchange.metrics is not None
    if exchange.metrics.labels[0] != exchange.model_name:
        exchange.metrics = exchange.model.metrics(exchange.model_name, answered=True)
    return exchange.metrics


def api_error(error: UpstreamError) -> ApiError:
    """Return what the client is told of a server's failure."""
    if isinstance(error, UnavailableError):
        return ApiError.of_upstream(error.status, error.body)
    code = f"upstream_{error.reason}"
    return ApiError(error.status, str(error), code=code, retry_after=1.0)


def headers_down(headers: Headers) -> Headers:
    """Return the upstream's headers that the client gets."""
    return [header for header in headers if header[0] not in NOT_SENT_DOWN]


def is_event_stream(headers: Headers) -> bool:
    """Return whether an answer is streamed."""
    return any(n == b"content-type" and v.startswith(b"text/event-stream") for n, v in headers)
