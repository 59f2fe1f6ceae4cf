"""A model server for tests: a real HTTP server whose answers, failures and gauges a test decides.

It counts what a gateway must not leave behind: requests that run, and requests that were aborted.

python -m tests.serving.standin PORT [BEFORE_S BETWEEN_S]: one in a process of its own.
"""

import asyncio
import json
import math
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import uvicorn

from tests.servers import free_port

TOKEN_USAGE = {"prompt_tokens": 7, "completion_tokens": 0, "total_tokens": 7}


class StandIn:
    """The server; its attributes may be changed while it runs."""

    def __init__(self, *models: str, port: int | None = None) -> None:
        self.models = models or ("m",)
        self.port = port or free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.healthy = True
        self.status = 200
        self.message = "no"  # of an error
        self.before_s = 0.0  # before the first byte of an answer's body
        self.between_s = 0.0  # between tokens
        self.break_after: int | None = None  # tokens, after which the connection is cut
        self.first_event: str | None = None  # of a stream, and its last
        self.kv_usage: float | None = None
        self.kv_bytes: int | None = None
        self.runs: dict[str, str] = {}  # what it says that it runs, as our vLLM plugin does
        self.probabilities = (0.5, 0.25, 0.125)  # of a token that is read, and of the ids after it
        self.text = ""  # of an answer that is not streamed; else numbers
        self.listed: bytes | None = None  # in the place of its list of models
        self.headers: list[tuple[bytes, bytes]] = []  # of answers, beside their own
        self.padding = ""  # behind each token of a stream
        self.vocabulary = "t"  # the text of a token, before its id
        self.waiting = 0
        self.running = self.started = self.finished = self.aborted = 0
        self.seen: list[dict[str, Any]] = []  # body, headers and path of each request

    def start(self) -> None:
        """Serve in a thread of its own; returns when it answers."""
        config = uvicorn.Config(
            self, port=self.port, lifespan="off", log_level="critical", access_log=False
        )
        self.server = uvicorn.Server(config)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started:
            assert self.thread.is_alive(), "the port was taken"
            time.sleep(0.005)
        self.loop = self.server.servers[0].get_loop()

    def kill(self) -> None:
        """End it as a crash does: every connection is reset, nothing is finished."""

        def cut() -> None:
            for listener in self.server.servers:
                listener.close()
            for connection in list(self.server.server_state.connections):
                connection.transport.abort()

        self.loop.call_soon_threadsafe(cut)
        self.server.should_exit = self.server.force_exit = True
        self.thread.join(10)
        assert not self.thread.is_alive()
        self.running = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """ASGI."""
        path = scope["path"]
        if path == "/health":
            await reply(send, 200 if self.healthy else 503, b"")
        elif path == "/metrics":
            await reply(send, 200, self._gauges())
        elif path == "/v1/models":
            data = [{"id": m, "object": "model", "max_model_len": 99} for m in self.models]
            listed = json.dumps({"object": "list", "data": data}).encode()
            await reply(send, 200, self.listed or listed)
        else:
            await self._complete(scope, receive, send)

    def _gauges(self) -> bytes:
        kv = "" if self.kv_usage is None else f'vllm:kv_cache_usage_perc{{a="b"}} {self.kv_usage}\n'
        if self.kv_bytes is not None:
            kv += f'vllm:cache_config_info{{kv_cache_memory_bytes="{self.kv_bytes}"}} 1.0\n'
        if self.runs:
            labels = ",".join(f'{name}="{value}"' for name, value in self.runs.items())
            kv += f"attnserve:server_info{{{labels}}} 1.0\n"
        lines = kv + f"vllm:num_requests_waiting {self.waiting}\nvllm:num_requests_running 0\n"
        return lines.encode()

    async def _complete(self, scope: Any, receive: Any, send: Any) -> None:
        raw = b""
        while True:
            message = await receive()
            raw += message.get("body", b"")
            if not message.get("more_body"):
                break
        body = json.loads(raw)
        headers = {k.decode(): v.decode() for k, v in scope["headers"]}
        self.seen.append({"path": scope["path"], "headers": headers, "body": body})
        self.started += 1
        self.running += 1
        answer = asyncio.ensure_future(self._answer(scope, body, send))
        gone = asyncio.ensure_future(receive())
        await asyncio.wait((answer, gone), return_when=asyncio.FIRST_COMPLETED)
        self.running -= 1
        if answer.done():
            self.finished += 1
        else:
            self.aborted += 1
            answer.cancel()
        gone.cancel()
        await asyncio.gather(answer, gone, return_exceptions=True)

    async def _answer(self, scope: Any, body: dict[str, Any], send: Any) -> None:
        tokens = body.get("max_tokens", 4)
        usage = {**TOKEN_USAGE, "completion_tokens": tokens}
        await asyncio.sleep(self.before_s)
        if self.status != 200:
            error = {"message": self.message, "type": "x", "param": None, "code": self.status}
            await reply(send, self.status, json.dumps({"error": error}).encode())
        elif body["model"] not in self.models:
            error = {"message": "no such model", "type": "NotFoundError", "param": "model"}
            await reply(send, 404, json.dumps({"error": {**error, "code": 404}}).encode())
        elif scope["path"] == "/tokenize":
            await reply(send, 200, json.dumps({"tokens": [7, 8, 9], "count": 3}).encode())
        elif not body.get("stream"):
            await asyncio.sleep(self.between_s * tokens)
            ids = list(range(tokens))
            text = self.text or "".join(f" {i}" for i in range(tokens))
            choice = {"index": 0, "text": text, **self._ids(body, ids)}
            if "prompt_logprobs" in body:
                choice["prompt_logprobs"] = self._logprobs(body["prompt"])
            whole = {"id": "x", "choices": [choice], "usage": usage}
            content = json.dumps(whole, separators=(",", ":")).encode()
            await reply(send, 200, content, *self.headers)
        else:
            await self._stream(scope, body, tokens, usage, send)

    @staticmethod
    def _ids(body: dict[str, Any], ids: list[int], first: bool = True) -> dict[str, Any]:
        """Return the token ids of an answer, as vLLM gives them: null to who did not ask."""
        asked = body.get("return_token_ids")
        prompt = body.get("prompt")
        prompt = prompt if isinstance(prompt, list) else [7, 8, 9]
        return {
            "prompt_token_ids": prompt if asked and first else None,
            "token_ids": ids if asked else None,
        }

    def _logprobs(self, ids: list[int]) -> list[Any]:
        """vLLM's `prompt_logprobs`."""
        return [
            None,
            *(
                {
                    str(id + i): {
                        "logprob": math.log(p),
                        "rank": i + 1,
                        "decoded_token": f"{self.vocabulary}{id + i}",
                    }
                    for i, p in enumerate(self.probabilities)
                }
                for id in ids[1:]
            ),
        ]

    async def _stream(
        self, scope: Any, body: dict[str, Any], tokens: int, usage: dict[str, int], send: Any
    ) -> None:
        headers = [(b"content-type", b"text/event-stream; charset=utf-8"), *self.headers]
        await send({"type": "http.response.start", "status": 200, "headers": headers})

        async def event(data: str) -> None:
            piece = f"data: {data}\n\n".encode()
            await send({"type": "http.response.body", "body": piece, "more_body": True})

        if self.first_event is not None:
            await event(self.first_event)
            tokens = 0
        for i in range(tokens):
            if i == self.break_after:
                for connection in list(self.server.server_state.connections):
                    if getattr(connection, "scope", None) is scope:
                        connection.transport.abort()
                return
            choice = {"index": 0, "text": f" {i}{self.padding}", **self._ids(body, [i], i == 0)}
            await event(json.dumps({"id": "x", "choices": [choice]}))
            await asyncio.sleep(self.between_s)
        if (body.get("stream_options") or {}).get("include_usage"):
            await event(json.dumps({"id": "x", "choices": [], "usage": usage}))
        await event("[DONE]")
        await send({"type": "http.response.body", "body": b"", "more_body": False})


async def reply(send: Any, status: int, body: bytes, *more: tuple[bytes, bytes]) -> None:
    """Send an answer in one piece."""
    length = b"%d" % len(body)
    headers = [(b"content-type", b"application/json"), (b"content-length", length), *more]
    await send({"type": "http.response.start", "status": status, "headers": headers})
    await send({"type": "http.response.body", "body": body, "more_body": False})


def standin(*models: str) -> AbstractContextManager[StandIn]:
    """One that runs."""
    return started(StandIn(*models))


@contextmanager
def started(server: StandIn) -> Iterator[StandIn]:
    """Run a server that has been made, and end it."""
    server.start()
    try:
        yield server
    finally:
        if server.thread.is_alive():
            server.kill()


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 60) -> None:
    """Wait until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"not within {seconds} s: {what}"
        time.sleep(0.02)


def wait_for_value(read: Callable[[], float], value: float, what: str, seconds: float = 60) -> None:
    """Wait until `read` gives `value`, which may be a loop's."""
    wait_for(lambda: read() == value, what, seconds)


if __name__ == "__main__":
    alone = StandIn(port=int(sys.argv[1]))
    alone.before_s, alone.between_s = (float(s) for s in (sys.argv[2:4] or (0, 0)))
    # Idle connections are kept for 5 s, uvicorn's default and vLLM's.
    uvicorn.run(alone, port=alone.port, lifespan="off", log_level="error")
