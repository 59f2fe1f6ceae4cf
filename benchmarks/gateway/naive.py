"""python -m benchmarks.gateway.naive CLIENT UPSTREAM PORT: the proxy that one writes first.

FastAPI, a StreamingResponse, and httpx or aiohttp (CLIENT) as the client. It has none of what a
gateway is for; it shows what the frameworks alone cost.
"""

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import aiohttp
import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

HEADERS = {"content-type": "application/json"}


def httpx_app(upstream: str) -> FastAPI:
    """Return the proxy with httpx."""
    client = httpx.AsyncClient(base_url=upstream, timeout=None, limits=httpx.Limits())
    app = FastAPI()

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await request.body()
        built = client.build_request("POST", "/v1/completions", content=body, headers=HEADERS)
        answer = await client.send(built, stream=True)
        if not json.loads(body).get("stream"):
            return Response(await answer.aread(), answer.status_code, media_type="application/json")

        async def pieces() -> AsyncIterator[bytes]:
            async for piece in answer.aiter_raw():
                yield piece
            await answer.aclose()

        return StreamingResponse(pieces(), media_type="text/event-stream")

    return app


def aiohttp_app(upstream: str) -> FastAPI:
    """Return the proxy with aiohttp."""
    sessions: list[aiohttp.ClientSession] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(connector=connector) as session:
            sessions.append(session)
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post("/v1/completions")
    async def completions(request: Request) -> Response:
        body = await request.body()
        url = f"{upstream}/v1/completions"
        answer = await sessions[0].post(url, data=body, headers=HEADERS)
        if not json.loads(body).get("stream"):
            return Response(await answer.read(), answer.status, media_type="application/json")

        async def pieces() -> AsyncIterator[bytes]:
            async for piece in answer.content.iter_any():
                yield piece
            answer.release()

        return StreamingResponse(pieces(), media_type="text/event-stream")

    return app


if __name__ == "__main__":
    make = {"httpx": httpx_app, "aiohttp": aiohttp_app}[sys.argv[1]]
    uvicorn.run(make(sys.argv[2]), port=int(sys.argv[3]), log_level="warning", access_log=False)
