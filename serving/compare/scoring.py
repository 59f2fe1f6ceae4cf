"""Requests of the gateway's own to the models: through the same queue, replicas and retries as
those of clients, with the answer kept here."""

import asyncio
import json
import time
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

from starlette.types import Message

from serving.call import Call
from serving.compare.kl import Position, other_text, positions
from serving.config import Limits
from serving.openai.errors import ApiError, kind_of
from serving.openai.request import Request
from serving.openai.sse import END, parsed
from serving.upstream.http import UpstreamError
from serving.upstream.proxy import Forward, UnavailableError

MISMATCH = "vocabulary_mismatch"
"""The error code of a model whose token ids stand for other tokens than the reference's."""


class Kept:
    """An answer in one piece."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.began = self.ended = 0.0  # sent to a server, and all there; time.perf_counter's

    async def send(self, message: Message) -> None:
        """Takes what would go to a client."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif self.status >= 400:
            self.body += message["body"]
        else:
            self.feed(message["body"])

    def feed(self, body: bytes) -> None:
        """Some of a good answer."""
        self.body += body


class Written(Kept):
    """A streamed answer: its tokens, and when they came."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self.error: dict[str, Any] | None = None
        self.times: list[float] = []  # of pieces with tokens, time.perf_counter's
        self._first = 0  # tokens of the first piece

    def feed(self, body: bytes) -> None:
        """Whole events."""
        before = len(self.ids)
        for event in END.split(body):
            data = parsed(event)
            if data is None:
                continue
            self.error = data.get("error", self.error)
            for choice in data.get("choices") or ():
                self.text += choice.get("text") or ""
                self.ids += choice.get("token_ids") or ()
                self.finish_reason = choice.get("finish_reason") or self.finish_reason
        if len(self.ids) > before:
            self._first = self._first or len(self.ids)
            self.times.append(time.perf_counter())

    def figures(self, reference: list[int]) -> dict[str, Any]:
        """The answer and its times in milliseconds, for an answer in JSON; `reference`: the token
        ids to compare it with."""
        times = self.times
        later = len(self.ids) - self._first
        gaps = [b - a for a, b in pairwise(times)]
        return {
            "text": self.text,
            "token_ids": self.ids,
            "finish_reason": self.finish_reason,
            "ttft_ms": milliseconds(times[0] - self.began) if times else None,
            "itl_ms": milliseconds((times[-1] - times[0]) / later) if later else None,
            "itl_max_ms": milliseconds(max(gaps)) if gaps else None,
            "duration_ms": milliseconds(self.ended - self.began),
            "first_difference": first_difference(self.ids, reference),
        }


def milliseconds(seconds: float) -> float:
    """To the microsecond."""
    return round(seconds * 1000, 3)


def first_difference(ids: list[int], others: list[int]) -> int | None:
    """The index of the first token that the two do not share; None: they are equal."""
    if ids == others:
        return None
    pairs = enumerate(zip(ids, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(others)))


async def ask(forward: Forward, call: Call, name: str, fields: dict[str, Any], to: Kept) -> None:
    """POST `fields` to a model; the whole of its answer is in `to` then, and is no error.

    Raises:
        ApiError: with the model's name in its message.
    """
    gateway = forward.gateway
    body = json.dumps({**fields, "model": name}).encode()
    # What a client may send has been looked at already: this is longer by the answer.
    request = Request(body, Limits(), gateway.config.routing.prefix_chars)
    call.model = gateway.model(name)
    call.counts = gateway.counts(call.model, name)
    call.model_name = name
    call.arrival = time.perf_counter()
    try:
        await forward(call, request, b"", to.send)
    except UnavailableError as error:
        raise failed(name, error.status, error.body) from None
    except UpstreamError as error:
        code = f"upstream_{error.reason}"
        message = f"{name}: {error}"
        raise ApiError(error.status, message, code=code, retry_after=1.0) from None
    except ApiError as error:
        raise failed(name, error.status, json.dumps(error.body).encode()) from None
    except asyncio.CancelledError:
        call.aborted = True
        raise
    to.ended = time.perf_counter()
    to.began = call.arrival + (call.queued or 0.0)
    if to.status >= 400:
        raise failed(name, to.status, to.body)


def failed(name: str, status: int, body: bytes) -> ApiError:
    """A model's own error, with its name."""
    error = json.loads(body)["error"]
    message = f"{name}: {error['message']}"
    return ApiError(status, message, error["type"], error["code"], error["param"], 1.0)


async def write(forward: Forward, call: Call, name: str, fields: dict[str, Any]) -> Written:
    """Have a model write an answer, streamed; `call.route` must be /v1/completions.

    Raises:
        ApiError: it did not, or not to the end.
    """
    options = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    answer = Written()
    await ask(forward, call, name, {**fields, **options}, answer)
    if answer.error is not None:
        error = answer.error
        raise ApiError(502, f"{name}: {error['message']}", kind_of(502), error["code"])
    if not answer.ids:
        message = f"{name}: The model server does not say which tokens it wrote."
        raise ApiError(502, message, code="upstream_unusable")
    return answer


async def read(
    forward: Forward, call: Call, name: str, ids: list[int], start: int, top_k: int
) -> tuple[list[Position], float]:
    """Have a model read token ids, and say of those from `start` on how likely each was, and which
    `top_k` would have been the likeliest; `call.route` must be /v1/completions. The second result
    is the time that it took in seconds.

    Raises:
        ApiError: it cannot.
    """
    answer = Kept()
    fields = {
        "prompt": ids,
        "add_special_tokens": False,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": top_k,
    }
    with same_vocabulary():
        await ask(forward, call, name, fields, answer)
    try:
        # In a thread: streams go on meanwhile.
        found = await asyncio.to_thread(positions, answer.body, ids, start)
    except ValueError as error:
        message = f"{name}: The model server's answer has {error}."
        raise ApiError(502, message, code="upstream_unusable") from None
    return found, answer.ended - answer.began


@contextmanager
def same_vocabulary() -> Iterator[None]:
    """Around requests with token ids of the reference: a model without one of them has another
    vocabulary.

    Raises:
        ApiError: 400.
    """
    try:
        yield
    except ApiError as error:
        if error.status == 400 and "out of vocabulary" in str(error):
            raise ApiError(400, str(error), code=MISMATCH, param="models") from None
        raise


def check_vocabulary(
    name: str, found: list[Position], reference: str, expected: list[Position]
) -> None:
    """Refuse to compare what two models say of the same ids if these are other tokens in each.

    Raises:
        ApiError: 400.
    """
    id = other_text(expected, found)
    if id is not None:
        message = (
            f"{name} has another vocabulary than {reference}: the token id {id} stands for another "
            "text. Only models with the same tokenizer can be compared."
        )
        raise ApiError(400, message, code=MISMATCH, param="models")
