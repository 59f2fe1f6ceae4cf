"""python -m benchmarks.gateway.floor KIND UPSTREAM PORT [WORKERS]: the least that Python costs.

KIND is "asgi", the gateway's own HTTP on both sides (uvicorn with uvloop and httptools, and its
connections to a server) with nothing between them but bytes, in one process or in so many workers;
or "pipe", one process that reads no HTTP at all and has one connection to the server for each
client's. Neither notices that a client has left.
"""

import asyncio
import socket
import sys
from functools import partial
from pathlib import Path
from urllib.parse import urlsplit

import uvicorn
import uvloop
from starlette.types import Receive, Scope, Send

from serving.client import direct_writer
from serving.exchange import JSON
from serving.upstream.pool import ConnectionPool
from serving.workers import run_workers

TIMEOUTS = {"connect_timeout": 5.0, "read_timeout": 600.0, "total_timeout": 3600.0}


class Forwarder:
    """An ASGI application that sends each request on as it came, and its answer back."""

    def __init__(self, upstream: str) -> None:
        self.pool = ConnectionPool(upstream, 4.0)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        body = b""
        more = True
        while more:
            message = await receive()
            body, more = body + message["body"], message["more_body"]
        method, headers = scope["method"], [JSON, (b"content-length", b"%d" % len(body))]
        connection = await self.pool.send(method, scope["path"], headers, body, **TIMEOUTS)
        kept = [header for header in connection.headers if header[0] != b"transfer-encoding"]
        start = {"type": "http.response.start", "status": connection.status, "headers": kept}
        await send(start)
        while piece := await connection.piece():
            await send({"type": "http.response.body", "body": piece, "more_body": True})
            if write := direct_writer(send):
                await connection.pour(write)
        await send({"type": "http.response.body", "body": b""})
        self.pool.put(connection)


class Pipe(asyncio.Protocol):
    """One end of a pipe: what comes goes to the other end."""

    def __init__(self, upstream: str, other: "Pipe | None" = None) -> None:
        self.upstream = upstream
        self.other = other
        self.transport: asyncio.Transport | None = None
        self.early: list[bytes] = []  # what came before the other end was there

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = transport  # type: ignore[assignment]  # uvloop's is not a subclass of it
        if self.other is None:
            self.other = Pipe(self.upstream, self)
            self.task = asyncio.create_task(self.connect(self.other))
        else:
            transport.writelines(self.other.early)  # type: ignore[attr-defined]

    async def connect(self, other: "Pipe") -> None:
        url = urlsplit(self.upstream)
        loop = asyncio.get_running_loop()
        await loop.create_connection(lambda: other, str(url.hostname), url.port or 80)

    def data_received(self, data: bytes) -> None:
        assert self.other is not None
        if self.other.transport is None:
            self.early.append(data)
        else:
            self.other.transport.write(data)

    def connection_lost(self, _: Exception | None) -> None:
        if self.other is not None and self.other.transport is not None:
            self.other.transport.close()


async def pipe(upstream: str, port: int) -> None:
    """Serve pipes until the process is killed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: Pipe(upstream), "127.0.0.1", port)
    await server.serve_forever()


def forward(
    upstream: str, port: int, listening: socket.socket | None = None, _: Path | None = None
) -> None:
    """Serve a `Forwarder` until the process is killed; a worker has a socket that listens."""
    app = Forwarder(upstream)
    config = uvicorn.Config(app, port=port, log_level="warning", access_log=False, lifespan="off")
    uvicorn.Server(config).run(None if listening is None else [listening])


if __name__ == "__main__":
    kind, upstream, port, *workers = sys.argv[1:]
    if kind == "pipe":
        uvloop.run(pipe(upstream, int(port)))
    elif workers:
        work = partial(forward, upstream, int(port))
        run_workers(int(workers[0]), "127.0.0.1", int(port), work)
    else:
        forward(upstream, int(port))
