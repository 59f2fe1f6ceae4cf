"""python -m benchmarks.gateway.naive CLIENT UPSTREAM PORT: the proxy that one writes first.

FastAPI, a StreamingResponse, and httpx or aiohttp (CLIENT) as the client. It has none of what a
gateway is for; it shows what the frameworks alone cost.
"""

import json
import sys
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import aiohttp
import httpx
import uvicorn
from fastapi import FastAPI, Request, Response
from fastapi.responses import StreamingResponse

PATH = "/v1/completions"
HEADERS = {"content-type": "application/json"}


def app_of(client: str, upstream: str) -> FastAPI:
    """Return the proxy, with "httpx" or "aiohttp"."""
    clients: list[Any] = []

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        if client == "httpx":
            made: Any = httpx.AsyncClient(timeout=None, limits=httpx.Limits())
        else:
            made = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0))
        async with made:
            clients.append(made)
            yield

    app = FastAPI(lifespan=lifespan)

    @app.post(PATH)
    async def completions(request: Request) -> Response:
        body = await request.body()
        if client == "httpx":
            asked = clients[0].build_request("POST", upstream + PATH, content=body, headers=HEADERS)
            answer = await clients[0].send(asked, stream=True)
            status, read, parts, close = (
                answer.status_code, answer.aread, answer.aiter_raw, answer.aclose
            )  # fmt: skip
        else:
            answer = await clients[0].post(upstream + PATH, data=body, headers=HEADERS)
            status, read, parts = answer.status, answer.read, answer.content.iter_any
            close = answer.wait_for_close
        if not json.loads(body).get("stream"):
            return Response(await read(), status, media_type="application/json")

        async def pieces() -> AsyncIterator[bytes]:
            async for piece in parts():
                yield piece
            await close()

        return StreamingResponse(pieces(), media_type="text/event-stream")

    return app


if __name__ == "__main__":
    app = app_of(sys.argv[1], sys.argv[2])
    uvicorn.run(app, port=int(sys.argv[3]), log_level="warning", access_log=False)
