"""The way of a request to a replica, to another if that one fails, and of the answer back.

Nothing is sent to the client before the first bytes of an answer's body are here, so until then
another replica can take the request over.
"""

import time

from starlette.types import Send

from serving.call import Call
from serving.observability.metrics import ModelMetrics
from serving.observability.tracing import Tracer
from serving.openai.errors import ApiError, normalise, retry_headers
from serving.openai.request import Request
from serving.openai.response import JSON, end_with_error, whole
from serving.openai.sse import Events, usage_of
from serving.protocol import direct
from serving.shape import without_nulls
from serving.state import Gateway
from serving.upstream.http import Connection, Headers, UpstreamError
from serving.upstream.replica import Replica, Turn, send_request

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

NO_BUFFERING = [(b"cache-control", b"no-cache"), (b"x-accel-buffering", b"no")]


class UnavailableError(UpstreamError):
    """A 502 or 503 of the upstream's own, or the 500 of one that is dying; `body` is in OpenAI's
    shape."""

    def __init__(self, status: int, body: bytes) -> None:
        super().__init__(status, "unavailable", "The model server is not available.")
        self.body = body


class Forward:
    """Passes requests on to the model servers."""

    def __init__(self, gateway: Gateway, tracer: Tracer | None) -> None:
        self.gateway = gateway
        self.tracer = tracer

    async def __call__(self, call: Call, request: Request, query: bytes, send: Send) -> None:
        """Send the request to a replica, and to another while nothing of an answer has come.

        Args:
            call: has its model and counts; what becomes known is added.
            request: what is sent, to `call.route` of the replica.
            query: what comes behind the route's "?", if anything.
            send: gets the answer.

        Raises:
            ApiError: there is no room for it.
            UpstreamError: all replicas that were tried have failed; nothing has been sent.
        """
        gateway = self.gateway
        assert call.model is not None and call.counts is not None
        began = time.perf_counter()
        turn = await gateway.queue.turn(gateway.model, request.model, request.prefix)
        call.queued = time.perf_counter() - began
        call.prompt_tokens = request.prompt_tokens
        call.stage = "before_first_token" if request.stream else "whole"
        tried = {turn.replica}
        while True:
            call.replica = turn.replica.url
            try:
                connection = await self._attempt(call, request, turn, query, send)
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
        self, call: Call, request: Request, turn: Turn, query: bytes, send: Send
    ) -> Connection:
        """Send the request to one replica, and its answer to the client.

        Raises:
            UpstreamError: the replica failed; if `call.status` is 0, nothing has been sent.
        """
        replica = turn.replica
        head = self._head(call, replica, query, len(request.body))
        left = replica.config.timeouts.total - (time.perf_counter() - call.arrival)
        connection = await send_request(replica, head, request.body, max(left, 0.001))
        try:
            if connection.status < 500 and is_event_stream(connection.headers):
                await self._stream(call, request, connection, turn, send)
            else:
                content = await connection.rest()
                await self._whole(call, connection, connection.status, content, turn, send)
        except BaseException:
            connection.close()
            raise
        return connection

    def _head(self, call: Call, replica: Replica, query: bytes, length: int) -> bytes:
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
        if query:
            target += "?" + query.decode("latin-1")
        headers += [call.id_header, JSON, (b"content-length", b"%d" % length)]
        return replica.head("POST", target, headers)

    async def _whole(
        self,
        call: Call,
        connection: Connection,
        status: int,
        content: bytes,
        turn: Turn,
        send: Send,
    ) -> None:
        """An answer in one piece; errors are brought into OpenAI's shape.

        Raises:
            UnavailableError: it is one that another replica may not give.
        """
        if status in (502, 503) or (status == 500 and not await turn.replica.is_well()):
            raise UnavailableError(status, normalise(content, status))
        turn.succeeded()
        headers = downward(connection.headers)
        if status >= 400:
            content = normalise(content, status)
            headers = [(n, v) for n, v in headers if n != b"content-type"] + [JSON]
            if status == 429 and not any(n == b"retry-after" for n, _ in headers):
                headers += retry_headers(1.0)
        else:
            self._known(call)
            content = without_nulls(content)
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
        write = None

        def pass_on(piece: bytes) -> bool:
            """An event after the first."""
            nonlocal last
            out, has_tokens = events.feed(piece)
            if has_tokens:
                now = clock()
                observe(now - last)
                last = now
            assert write is not None
            return write(out) if out else True

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
                        if events.error and not events.count:
                            # vLLM's head says 200 before it looks at all of the request.
                            status, content = events.error_status, events.error
                            await connection.rest()
                            await self._whole(call, connection, status, content, turn, send)
                            return
                        await self._start_stream(call, connection, send)
                    await send({"type": "http.response.body", "body": out, "more_body": True})
                    if last and (write := direct(send)):
                        await connection.pour(pass_on)
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


def downward(headers: Headers) -> Headers:
    """The upstream's headers that the client gets."""
    return [(name, value) for name, value in headers if name not in NOT_SENT_DOWN]


def is_event_stream(headers: Headers) -> bool:
    """Whether an answer is streamed."""
    return any(n == b"content-type" and v.startswith(b"text/event-stream") for n, v in headers)
