"""python -m benchmarks.gateway.upstream PORT TOKENS PAUSE_MS: the model server of the benchmark.

It streams TOKENS events of the size that vLLM's have, PAUSE_MS apart, each in a write of its own,
or sends the same text whole; and it answers any GET. It is written on a bare socket because the
machine is to be busy with the gateway.
"""

import asyncio
import json
import sys
from typing import cast

import httptools
import uvloop

ID = "cmpl-0123456789abcdef0123456789abcdef"


def chunk(data: bytes) -> bytes:
    """Return one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(fields: dict[str, object]) -> bytes:
    """Return one server-sent event, as a chunk."""
    head: dict[str, object] = {
        "id": ID,
        "object": "text_completion",
        "created": 1763800000,
        "model": "m",
    }
    return chunk(f"data: {json.dumps({**head, **fields}, separators=(',', ':'))}\n\n".encode())


def choice(text: str) -> dict[str, object]:
    """Return a choice with some text."""
    return {"index": 0, "text": text, "logprobs": None, "finish_reason": None, "stop_reason": None}


class ModelServer(asyncio.Protocol):
    """A connection."""

    def __init__(self, tokens: int, pause: float) -> None:
        self.pause = pause
        self.parser = httptools.HttpRequestParser(self)
        usage = {"prompt_tokens": 16, "total_tokens": 16 + tokens, "completion_tokens": tokens}
        self.events = [event({"choices": [choice(f" token{i}")]}) for i in range(tokens)]
        self.usage = event({"choices": [], "usage": usage})
        text = "".join(f" token{i}" for i in range(tokens))
        body = json.dumps({"id": ID, "model": "m", "choices": [choice(text)], "usage": usage})
        self.whole = self.answer(body.encode())

    @staticmethod
    def answer(body: bytes) -> bytes:
        """Return an answer in one piece."""
        head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
        return head % len(body) + body

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Do what asyncio.Protocol asks for."""
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass of it

    def data_received(self, data: bytes) -> None:
        """Do what asyncio.Protocol asks for."""
        self.parser.feed_data(data)

    def connection_lost(self, _: Exception | None) -> None:
        """Do what asyncio.Protocol asks for."""
        self.events = []

    def on_url(self, url: bytes) -> None:
        """Keep a part of the request; called by httptools."""
        self.url = url
        self.body = b""

    def on_body(self, body: bytes) -> None:
        """Keep a part of the request; called by httptools."""
        self.body += body

    def on_message_complete(self) -> None:
        """Answer; called by httptools."""
        fields = json.loads(self.body) if self.body else {}
        if not self.body:
            models = {"object": "list", "data": [{"id": "m", "object": "model"}]}
            self.write(self.answer(json.dumps(models).encode()))
        elif fields.get("stream"):
            self.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                b"transfer-encoding: chunked\r\n\r\n"
            )
            last = self.usage if (fields.get("stream_options") or {}).get("include_usage") else b""
            self.step(0, last + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        else:
            self.write(self.whole)

    def step(self, i: int, last: bytes) -> None:
        """Send one event, and later the next."""
        if i < len(self.events):
            self.write(self.events[i])
            asyncio.get_running_loop().call_later(self.pause, self.step, i + 1, last)
        elif self.events:
            self.write(last)

    def write(self, data: bytes) -> None:
        """Send to the client."""
        self.transport.write(data)


async def serve(port: int, tokens: int, pause: float) -> None:
    """Serve until the process is killed."""
    loop = asyncio.get_running_loop()
    server = await loop.create_server(lambda: ModelServer(tokens, pause), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) / 1000))
