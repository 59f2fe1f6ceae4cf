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

HEAD = {"id": "cmpl-0123456789abcdef0123456789abcdef", "object": "text_completion",
        "created": 1763800000, "model": "m"}  # fmt: skip


def chunk(data: bytes) -> bytes:
    """Return one chunk of a chunked body."""
    return b"%x\r\n%b\r\n" % (len(data), data)


def event(**fields: object) -> bytes:
    """Return one server-sent event, as a chunk."""
    return chunk(f"data: {json.dumps({**HEAD, **fields}, separators=(',', ':'))}\n\n".encode())


def choices(text: str) -> list[dict[str, object]]:
    """Return a choice with some text."""
    empty = {"logprobs": None, "finish_reason": None, "stop_reason": None}
    return [{"index": 0, "text": text, **empty}]


def answer(fields: dict[str, object]) -> bytes:
    """Return an answer in one piece."""
    body = json.dumps(fields).encode()
    head = b"HTTP/1.1 200 OK\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n"
    return head % len(body) + body


class Answers:
    """What the server sends, made once: not while a new connection waits for it."""

    def __init__(self, tokens: int) -> None:
        texts = [f" token{i}" for i in range(tokens)]
        usage = {"prompt_tokens": 16, "total_tokens": 16 + tokens, "completion_tokens": tokens}
        self.events = [event(choices=choices(text)) for text in texts]
        self.usage = event(choices=[], usage=usage)
        self.whole = answer({**HEAD, "choices": choices("".join(texts)), "usage": usage})
        self.models = answer({"object": "list", "data": [{"id": "m", "object": "model"}]})


class ModelServer(asyncio.Protocol):
    """A connection; its methods are those that asyncio and httptools call."""

    def __init__(self, answers: Answers, pause: float) -> None:
        self.answers = answers
        self.pause = pause
        self.parser = httptools.HttpRequestParser(self)
        self.body = b""
        self.lost = False

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is not a subclass of it

    def data_received(self, data: bytes) -> None:
        self.parser.feed_data(data)

    def connection_lost(self, _: Exception | None) -> None:
        self.lost = True

    def on_message_begin(self) -> None:
        self.body = b""

    def on_body(self, body: bytes) -> None:
        self.body += body

    def on_message_complete(self) -> None:
        fields = json.loads(self.body) if self.body else {}
        if not self.body:
            self.transport.write(self.answers.models)
        elif fields.get("stream"):
            self.transport.write(
                b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream; charset=utf-8\r\n"
                b"transfer-encoding: chunked\r\n\r\n"
            )
            options = fields.get("stream_options") or {}
            last = self.answers.usage if options.get("include_usage") else b""
            self.step(0, last + chunk(b"data: [DONE]\n\n") + b"0\r\n\r\n")
        else:
            self.transport.write(self.answers.whole)

    def step(self, i: int, last: bytes) -> None:
        """Send one event, and later the next."""
        if self.lost:
            return
        if i < len(self.answers.events):
            self.transport.write(self.answers.events[i])
            asyncio.get_running_loop().call_later(self.pause, self.step, i + 1, last)
        else:
            self.transport.write(last)


async def serve(port: int, tokens: int, pause: float) -> None:
    """Serve until the process is killed."""
    loop = asyncio.get_running_loop()
    answers = Answers(tokens)
    server = await loop.create_server(lambda: ModelServer(answers, pause), "127.0.0.1", port)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve(int(sys.argv[1]), int(sys.argv[2]), float(sys.argv[3]) / 1000))
