"""The gateway's routes: those passed on to model servers by `Proxy`, all others by FastAPI."""

import asyncio
import gc
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Message, Receive, Scope, Send

from serving.call import Call
from serving.compare.handler import COMPARE, Compare
from serving.config import EVERY
from serving.observability.tracing import tracer
from serving.openai.errors import ApiError, error_body, kind_of, no_such_model
from serving.openapi import describe_proxied
from serving.playground import add_playground
from serving.proxy import ROUTES, Proxy
from serving.state import Gateway
from serving.upstream.http import UpstreamError
from serving.upstream.router import Model

API = ROUTES | {COMPARE, "/v1/models"}
"""What clients ask for under a base URL; a slash at the end of one changes nothing."""


class App:
    """The whole gateway as one ASGI application.

    A proxied request does not go through FastAPI, whose layers it would pay for and not use.
    """

    def __init__(self, gateway: Gateway) -> None:
        self.gateway = gateway
        self.tracer = tracer()
        self.proxy = Proxy(gateway, self.tracer)
        self.compare = Compare(gateway, self.tracer)
        self.fastapi = routes(gateway, self._lifespan)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request, or run the lifespan."""
        if scope["type"] != "http":
            await self.fastapi(scope, receive, send)
            return
        path = scope["path"]
        if path.endswith("/") and path.rstrip("/") in API:
            path = path.rstrip("/")
            scope = {**scope, "path": path}
        if path in ROUTES:
            await self.proxy(scope, receive, send)
        elif path == COMPARE:
            await self.compare(scope, receive, send)
        else:
            await self._own(scope, receive, send)

    async def _own(self, scope: Scope, receive: Receive, send: Send) -> None:
        """A route of FastAPI's, counted, with a request id."""
        status = 499
        id_header = Call(scope).id_header

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message = {**message, "headers": [*message["headers"], id_header]}
            await send(message)

        self.gateway.in_flight += 1
        try:
            await self.fastapi(scope, receive, send_and_note)
        finally:
            self.gateway.in_flight -= 1
            route = getattr(scope.get("route"), "path", "unmatched")
            self.gateway.metrics.requests.labels(route, "", "", "", str(status)).inc()

    @asynccontextmanager
    async def _lifespan(self, _: FastAPI) -> AsyncIterator[None]:
        async with self.gateway:
            gc.collect()
            gc.freeze()  # what is here now stays: not to be looked at in every collection
            yield
        if self.tracer is not None:
            await asyncio.to_thread(self.tracer.close)


def routes(gateway: Gateway, lifespan: Any) -> FastAPI:
    """The routes that the gateway answers itself."""
    app = FastAPI(title="attnserve gateway", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected_error)

    def check_key(request: Request) -> bytes:
        """401 without a key that is needed; else the client's header."""
        authorization = request.headers.get("authorization", "").encode("latin-1")
        gateway.keys.account(authorization)
        return authorization

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        """The models that are served, over all servers."""
        found = await all_models(gateway, check_key(request))
        return JSONResponse({"object": "list", "data": found})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        """One of them."""
        for entry in await all_models(gateway, check_key(request)):
            if entry["id"] == name:
                return JSONResponse(entry)
        raise no_such_model(name)

    @app.get("/health")
    async def health() -> Response:
        """200 while at least one server can answer, else 503."""
        models: dict[str, dict[str, Any]] = {}
        for entry in gateway.all_models():
            healthy = sum(r.healthy is True for r in entry.replicas)
            models[entry.name] = {
                "replicas": len(entry.replicas),
                "healthy": healthy,
                "label_errors": list(entry.description.errors),
            }
        counts = [m["healthy"] for m in models.values()]
        status = "ok" if all(counts) else "degraded" if any(counts) else "unavailable"
        content = {"status": status, "upstream_ready": any(counts), "models": models}
        return JSONResponse(content, 200 if any(counts) else 503)

    @app.get("/metrics")
    async def prometheus(request: Request) -> Response:
        """The gateway's metrics in Prometheus' text format."""
        if gateway.config.protect_metrics:
            check_key(request)
        return Response(generate_latest(gateway.metrics.registry), media_type=CONTENT_TYPE_LATEST)

    add_playground(app, gateway)
    describe_proxied(app)
    return app


async def all_models(gateway: Gateway, authorization: bytes) -> list[dict[str, Any]]:
    """Every model once: as its servers describe it, with what they run and wrong labels."""
    models = gateway.all_models()
    passed = [] if gateway.keys else [(b"authorization", authorization)]
    answers = await asyncio.gather(
        *(listed(model, passed if authorization else []) for model in models),
        return_exceptions=True,
    )
    found: dict[str, dict[str, Any]] = {}
    for model, answer in zip(models, answers, strict=True):
        entries: list[dict[str, Any]] = [] if isinstance(answer, BaseException) else answer
        known = {e["id"]: e for e in entries}
        names = known if model.entry.name == EVERY else [model.entry.name]
        for name in names:
            own = {"id": name, "object": "model", "created": STARTED, "owned_by": "attnserve"}
            own |= known.get(name, {})
            own["attnserve"] = model.description.json()
            found.setdefault(name, own)
    if not found:
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
    return list(found.values())


STARTED = int(time.time())


async def listed(model: Model, headers: list[tuple[bytes, bytes]]) -> list[dict[str, Any]]:
    """What one of a model's servers says that it serves.

    Raises:
        ApiError: it cannot be asked.
    """
    error: Exception = ApiError(503, "The model server cannot be reached.", retry_after=1.0)
    for replica in model.usable():
        try:
            status, body = await replica.get("/v1/models", headers)
            if status == 200:
                entries = json.loads(body)["data"]
                return [e for e in entries if isinstance(e["id"], str)]
            error = ApiError(status if status == 401 else 502, f"A model server said {status}.")
        except UpstreamError as e:
            code = f"upstream_{e.reason}"
            error = ApiError(e.status, str(e), code=code, retry_after=1.0)
        except (ValueError, KeyError, TypeError):
            error = ApiError(502, "A model server's list of models is no such list.")
    raise error


async def api_error(_: Request, error: Exception) -> Response:
    """An error of the gateway's own, in OpenAI's shape."""
    assert isinstance(error, ApiError)
    headers = {k.decode(): v.decode() for k, v in error.headers()}
    return JSONResponse(error.body, error.status, headers)


async def http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    message, code = str(error.detail), None
    if error.status_code == 404:
        message, code = f"Invalid URL ({request.method} {request.url.path})", "unknown_url"
    elif error.status_code == 405:
        message = f"Not allowed to {request.method} on {request.url.path}"
        code = "method_not_supported"
    content = error_body(message, kind_of(error.status_code), code)
    return JSONResponse(content, error.status_code, error.headers)


async def unexpected_error(_: Request, __: Exception) -> Response:
    """A mistake in the gateway itself; the server logs its traceback."""
    return JSONResponse(error_body("The gateway failed.", "server_error"), 500)
