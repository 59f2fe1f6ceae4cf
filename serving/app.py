"""The gateway's routes."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST, generate_latest
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.responses import Response

from serving.errors import error_body, kind_of
from serving.forward import Forward
from serving.metrics import CountRequests, Metrics
from serving.settings import Settings
from serving.upstream import Upstream


def create_app(settings: Settings) -> FastAPI:
    """The gateway for one vLLM server."""
    metrics = Metrics()
    upstream = Upstream(settings)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        async with upstream:
            yield

    app = FastAPI(title="attnserve gateway", lifespan=lifespan, docs_url=None, redoc_url=None)
    app.add_middleware(CountRequests, metrics=metrics)
    app.add_exception_handler(HTTPException, http_error)
    app.add_exception_handler(Exception, unexpected_error)

    @app.post("/v1/completions")
    async def completions() -> Response:
        """Complete a prompt; with "stream": true as server-sent events."""
        return Forward(upstream, metrics)

    @app.get("/v1/models")
    async def models() -> Response:
        """The models that the upstream serves."""
        return Forward(upstream, metrics)

    @app.get("/health")
    async def health() -> Response:
        """200 if the gateway and its upstream can answer, else 503."""
        ready = await upstream.healthy()
        content = {"status": "ok" if ready else "unavailable", "upstream_ready": ready}
        return JSONResponse(content, 200 if ready else 503)

    @app.get("/metrics")
    async def prometheus() -> Response:
        """The gateway's counters in Prometheus' text format."""
        return Response(generate_latest(metrics.registry), media_type=CONTENT_TYPE_LATEST)

    return app


async def http_error(request: Request, error: Exception) -> Response:
    """Unknown paths and wrong methods, in OpenAI's shape."""
    assert isinstance(error, HTTPException)
    message, code = str(error.detail), None
    if error.status_code == 404:
        message, code = f"Invalid URL ({request.method} {request.url.path})", "unknown_url"
    elif error.status_code == 405:
        message, code = (
            f"Not allowed to {request.method} on {request.url.path}",
            "method_not_supported",
        )
    content = error_body(message, kind_of(error.status_code), code)
    return JSONResponse(content, error.status_code, error.headers)


async def unexpected_error(_: Request, __: Exception) -> Response:
    """A mistake in the gateway itself; the server logs its traceback."""
    return JSONResponse(error_body("The gateway failed.", "server_error"), 500)
