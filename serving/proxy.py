"""The routes that are passed on to a model server."""

from starlette.types import Scope, Send

from serving.call import Call
from serving.request import Request
from serving.route import Route

ROUTES = frozenset({"/v1/completions", "/v1/chat/completions", "/v1/embeddings"})


class Proxy(Route):
    """An ASGI application for ROUTES."""

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
        await self.forward(call, request, scope["query_string"], send)
