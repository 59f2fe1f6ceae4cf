"""The routes that are passed on to a model server."""

from starlette.types import Scope, Send

from serving.call import Call
from serving.compare.shadow import Shadow, Tap, with_ids
from serving.handler import Route
from serving.observability.tracing import Tracer
from serving.openai.request import Request
from serving.state import Gateway

ROUTES = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/embeddings"})


WRITING = ROUTES - {"/v1/embeddings"}


class Proxy(Route):
    """An ASGI application for ROUTES."""

    def __init__(self, gateway: Gateway, tracer: Tracer | None) -> None:
        super().__init__(gateway, tracer)
        self.shadow = Shadow(self.forward)

    async def respond(self, call: Call, raw: bytes, scope: Scope, send: Send) -> None:
        """Pass the request on as it came."""
        config = self.gateway.config
        request = Request(raw, config.limits, config.routing.prefix_chars)
        call.model = self.gateway.model(request.model)
        call.counts = self.gateway.counts(call.model, request.model)
        call.model_name = request.model
        if call.account is not None:
            call.account.reserve(request.tokens)
            call.reserved = request.tokens
        query = scope["query_string"]
        if not (call.route in WRITING and self.shadow.takes(request.model, raw)):
            await self.forward(call, request, query, send)
            return
        request.body = with_ids(request.body)
        tap = Tap(send)
        await self.forward(call, request, query, tap.send)
        self.shadow.offer(call, tap)
