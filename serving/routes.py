"""The routes that the gateway answers itself: models, health, metrics and the playground."""

import asyncio
import json
import time
from typing import Any

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from serving.config import EVERY
from serving.openai.errors import UNEXPECTED, ApiError, error_body, error_type, no_such_model
from serving.openapi import describe_proxied
from serving.playground import add_playground
from serving.state import GatewayState
from serving.upstream.http import UpstreamError
from serving.upstream.router import Model

STARTED = int(time.time())
"""What `created` says of every model."""


def make_routes(state: GatewayState, lifespan: Any) -> FastAPI:
    """Return the application with all of them."""
    app = FastAPI(title="attnserve gateway", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_exception_handler(ApiError, api_error)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected_error)

    def check_key(request: Request) -> bytes:
        """Return the client's Authorization header; 401 if it has no key that is needed."""
        authorization = request.headers.get("authorization", "").encode("latin-1")
        if state.keys:
            state.keys.account(authorization)
        return authorization

    @app.get("/v1/models")
    async def models(request: Request) -> Response:
        """List the models that are served, over all servers."""
        found = await all_models(state, check_key(request))
        return JSONResponse({"object": "list", "data": found})

    @app.get("/v1/models/{name:path}")
    async def model(request: Request, name: str) -> Response:
        """Describe one model."""
        for entry in await all_models(state, check_key(request)):
            if entry["id"] == name:
                return JSONResponse(entry)
        raise no_such_model(name)

    @app.get("/health")
    async def health() -> Response:
        """Answer 200 while at least one server is healthy, else 503."""
        models: dict[str, dict[str, Any]] = {}
        for entry in state.router.models.values():
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
        """Return the gateway's metrics in Prometheus' text format."""
        if state.config.metrics_need_key:
            check_key(request)
        pages = state.pages
        page = pages.page() if pages else generate_latest(state.metrics.registry)
        return Response(page, media_type=CONTENT_TYPE_LATEST)

    add_playground(app, state)
    describe_proxied(app)
    return app


async def all_models(state: GatewayState, authorization: bytes) -> list[dict[str, Any]]:
    """Return every model once: as its servers describe it, with what they run and wrong labels."""
    models = state.router.models.values()
    passed = authorization and not state.keys
    headers = [(b"authorization", authorization)] if passed else []
    answers = await asyncio.gather(
        *(served_models(model, headers) for model in models), return_exceptions=True
    )
    found: dict[str, dict[str, Any]] = {}
    for model, answer in zip(models, answers, strict=True):
        entries: list[dict[str, Any]] = [] if isinstance(answer, BaseException) else answer
        known = {e["id"]: e for e in entries}
        names = known if model.entry.name == EVERY else [model.entry.name]
        for name in names:
            own = {"id": name, "object": "model", "created": STARTED, "owned_by": "attnserve"}
            own |= known.get(name, {})
            own["attnserve"] = model.description.as_json()
            found.setdefault(name, own)
    if not found:
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
    return list(found.values())


async def served_models(model: Model, headers: list[tuple[bytes, bytes]]) -> list[dict[str, Any]]:
    """Return what one of a model's servers says that it serves; all of those for every name.

    Raises:
        ApiError: it cannot be asked.
    """
    error: Exception = ApiError(503, "The model server cannot be reached.", retry_after=1.0)
    found: dict[str, dict[str, Any]] | None = None
    for replica in model.usable():
        try:
            status, body = await replica.get("/v1/models", headers)
            if status == 200:
                entries = [e for e in json.loads(body)["data"] if isinstance(e["id"], str)]
                JSONResponse(entries)  # an error if they cannot be passed on
                found = {entry["id"]: entry for entry in entries} | (found or {})
                if model.entry.name != EVERY:
                    break
            error = ApiError(status if status == 401 else 502, f"A model server said {status}.")
        except UpstreamError as e:
            error = ApiError(e.status, str(e), code=e.code, retry_after=1.0)
        except UNEXPECTED:
            error = ApiError(502, "A model server's list of models is no such list.")
    if found is None:
        raise error
    return list(found.values())


async def api_error(_: Request, error: Exception) -> Response:
    """Answer with an error of the gateway's own."""
    assert isinstance(error, ApiError)
    headers = {k.decode(): v.decode() for k, v in error.headers()}
    return JSONResponse(error.body, error.status, headers)


async def http_error(request: Request, error: Exception) -> Response:
    """Answer for unknown paths and wrong methods, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    message, code = str(error.detail), None
    if error.status_code == 404:
        message, code = f"Invalid URL ({request.method} {request.url.path})", "unknown_url"
    elif error.status_code == 405:
        message = f"Not allowed to {request.method} on {request.url.path}"
        code = "method_not_supported"
    content = error_body(message, error_type(error.status_code), code)
    return JSONResponse(content, error.status_code, error.headers)


async def unexpected_error(_: Request, __: Exception) -> Response:
    """Answer for a mistake in the gateway itself; the server logs its traceback."""
    return JSONResponse(error_body("The gateway failed.", "server_error"), 500)
