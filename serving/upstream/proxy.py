"""The way of a request to a replica, to another if that one fails, and of the answer back.

Nothing is sent to the client before the first bytes of an answer's body are here, so until then
another replica can take the request over.
"""

import json
import time

from serving.config import EVERY
from serving.exchange import JSON, Exchange
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
NOT_STREAMED_DOWN = NOT_SENT_DOWN.union(name for name, _ in NO_BUFFERING)

RETRIED = frozenset({"unreachable", "unavailable", "crashed", "no_such_model"})
"""Why a server fails a request that another one may then get."""

NOT_ITS_FAULT = frozenset({"no_such_model", "overtime"})
"""Reasons that say nothing against a server: its circuit does not count them."""


class AnswerError(UpstreamError):
    """An error that a server has answered with, and that another server may not give."""

    def __init__(self, status: int, reason: str, body: bytes, was_read: bool) -> None:
        super().__init__(status, reason, "The model server is not available.", was_read)
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
        may_have_run = 0  # servers that may have begun to work on it
        while True:
            exchange.replica = attempt.replica.url
            try:
                await self._send(exchange, request, attempt)
                return
            except UpstreamError as error:
                if error.reason == "slow_client":
                    raise api_error(error) from None
                if error.reason == "broken" and not await attempt.replica.is_healthy():
                    error.reason = "crashed"
                may_have_run += error.was_read
                following = self._another(exchange, error, tried) if may_have_run < 2 else None
                made_up = error.reason == "no_such_model" and exchange.model.entry.name == EVERY
                if following is not None or not made_up:  # by the client
                    self._count(exchange, error.reason)
                if error.reason not in NOT_ITS_FAULT:
                    attempt.failed()
                if following is None:
                    raise api_error(error) from None
                metrics.retries.labels(*exchange.metrics.labels, error.reason).inc()
                exchange.retries += 1
            finally:
                attempt.end()
                router.wake()
            attempt = Attempt(following)
            tried.add(following)

    def _another(
        self, exchange: Exchange, error: UpstreamError, tried: set[Replica]
    ) -> Replica | None:
        """Return where to try again; None if it is too late, or might run twice."""
        if exchange.status or error.reason not in RETRIED:
            return None
        if exchange.retries >= self.state.config.routing.retries:
            return None
        model = self.state.router.model(exchange.model_name)
        lacked = error.reason == "no_such_model"
        return model.another(exchange.model_name, tried, lacked)

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
                await self._rest(exchange, request, connection, attempt)
        except BaseException:
            connection.close()
            raise
        replica.pool.put(connection)

    def _headers_up(self, exchange: Exchange, length: int) -> Headers:
        """Return the headers of the request to a model server."""
        headers = end_to_end(exchange.headers, NOT_SENT_UP)
        if exchange.span is not None and self.tracer is not None:
            own = self.tracer.headers(exchange.span)
            headers = [(n, v) for n, v in headers if n not in own] + list(own.items())
        return [*headers, exchange.id_header, JSON, (b"content-length", b"%d" % length)]

    def _count(self, exchange: Exchange, reason: str) -> None:
        """Count that a replica has failed a request."""
        assert exchange.metrics is not None
        exchange.upstream_error = reason
        self.state.metrics.upstream_errors.labels(*exchange.metrics.labels, reason).inc()

    async def _blame(self, exchange: Exchange, attempt: Attempt) -> None:
        """Count an error inside a stream, which may stand for a crash."""
        reason = "error"
        try:
            if not await attempt.replica.is_healthy():
                reason = "crashed"
        finally:  # the client may leave meanwhile
            self._count(exchange, reason)

    async def _rest(
        self, exchange: Exchange, request: ModelRequest, connection: Connection, attempt: Attempt
    ) -> None:
        """Send an answer that is not streamed, once all of it is here.

        Raises:
            ApiError: 503; clients have too many bytes to read as it is.
        """
        unread, limits = self.state.unread, self.state.config.limits
        held = 0

        def hold(size: int) -> None:
            nonlocal held
            held += size
            unread.bytes += size
            if not unread.make_room(limits.max_unread_bytes):
                message = "The gateway holds as many bytes of answers as it may."
                raise ApiError(503, message, code="too_many_unread_bytes", retry_after=1.0)

        try:
            content = await connection.rest(limits.max_answer_bytes, hold)
            await self._whole(exchange, request, connection, connection.status, content, attempt)
        finally:
            unread.bytes -= held

    async def _whole(
        self,
        exchange: Exchange,
        request: ModelRequest,
        connection: Connection,
        status: int,
        content: bytes,
        attempt: Attempt,
    ) -> None:
        """Send an answer in one piece; errors are brought into OpenAI's shape.

        Raises:
            AnswerError: it is one that another replica may not give.
        """
        if status in (502, 503):  # a 502 is of a proxy, whose server may have crashed
            raise AnswerError(status, "unavailable", content, was_read=status == 502)
        if status == 500 and not await attempt.replica.is_healthy():
            raise AnswerError(status, "crashed", content, was_read=True)
        headers = headers_down(connection.headers)
        if status >= 400:
            body = normalise(content, status)
            if body["error"]["code"] == "model_not_found" and exchange.model is not None:
                attempt.succeeded()
                if exchange.model.entry.name != EVERY:
                    attempt.replica.note_lack(exchange.model.entry.name)
                raise AnswerError(status, "no_such_model", content, was_read=False)
            if status >= 500:
                self._count(exchange, "error")
            content = json.dumps(body).encode()
            headers = [(n, v) for n, v in headers if n != b"content-type"] + [JSON]
            if status == 429 and not any(n == b"retry-after" for n, _ in headers):
                headers += retry_headers(1.0)
        else:
            content = without_nulls(content)
            # Embeddings as plain bytes have theirs in a header, or none.
            usage = usage_of(content) or usage_of(dict(headers).get(b"metadata", b""))
            if usage is None and exchange.reservation is not None:  # which would cost nothing
                usage = request.prompt_tokens, request.tokens - request.prompt_tokens
            exchange.note_usage(usage)
        attempt.succeeded()
        await exchange.answer(status, headers, content)

    async def _stream(
        self, exchange: Exchange, request: ModelRequest, connection: Connection, attempt: Attempt
    ) -> None:
        """Send server-sent events, each as soon as it is whole."""
        assert exchange.metrics is not None
        stream = EventStream(exchange, exchange.metrics, connection, request.hide_usage)
        try:
            events = await stream.begin()
            if stream.error and not stream.count:
                # vLLM's head says 200 before it looks at all of the request.
                content = json.dumps(stream.error).encode()
                status = stream.error_status
                await self._whole(exchange, request, connection, status, content, attempt)
                return
            attempt.began()
            headers = end_to_end(connection.headers, NOT_STREAMED_DOWN)
            await exchange.start(connection.status, headers + NO_BUFFERING)
            await stream.pass_on(events)
            if stream.error is not None:
                exchange.code, exchange.upstream_status = "upstream_error", stream.error_status
            failed = stream.error is not None and stream.error_status >= 500
            if failed:
                attempt.failed()
                await self._blame(exchange, attempt)
            await stream.end()
            if not failed:
                attempt.succeeded()
        finally:
            behind = stream.take_unread()
            exchange.completion_tokens = request.tokens_of(stream.count)
            exchange.note_usage(stream.usage)
            if behind and not exchange.usage_known:
                most = request.tokens - request.prompt_tokens
                exchange.unseen_tokens = max(0, most - exchange.completion_tokens)


def api_error(error: UpstreamError) -> ApiError:
    """Return what the client is told of a server's failure."""
    if isinstance(error, AnswerError):
        return ApiError.of_upstream(error.status, error.body)
    return ApiError(error.status, str(error), code=error.code, retry_after=1.0)


def headers_down(headers: Headers) -> Headers:
    """Return the upstream's headers that the client gets."""
    return end_to_end(headers, NOT_SENT_DOWN)


def end_to_end(headers: Headers, dropped: frozenset[bytes]) -> Headers:
    """Return headers without some, and without those that `Connection` says are for it only."""
    for name, value in headers:
        if name == b"connection":
            dropped = dropped.union(n.strip() for n in value.lower().split(b","))
    return [header for header in headers if header[0] not in dropped]


def is_event_stream(headers: Headers) -> bool:
    """Return whether an answer is streamed."""
    return any(n == b"content-type" and v.startswith(b"text/event-stream") for n, v in headers)
