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

from serving.compare.kl import Position, other_text, positions
from serving.compare.request import route_of
from serving.config import Limits
from serving.exchange import Exchange
from serving.openai.errors import UNEXPECTED, ApiError
from serving.openai.request import read_request, to_json
from serving.openai.sse import END, event_data, event_text
from serving.upstream.proxy import Proxy

MISMATCH = "vocabulary_mismatch"
"""The error code of a model whose token ids stand for other tokens than the reference's."""


class KeptAnswer:
    """An answer in one piece."""

    def __init__(self) -> None:
        self.status = 0
        self.body = b""
        self.began = self.ended = 0.0  # sent to a server, and all there; time.perf_counter's

    async def send(self, message: Message) -> None:
        """Take what would go to a client."""
        if message["type"] == "http.response.start":
            self.status = message["status"]
        elif self.status >= 400:
            self.body += message["body"]
        else:
            self.feed(message["body"])

    def feed(self, body: bytes) -> None:
        """Take a piece of a good answer."""
        self.body += body

    @property
    def seconds(self) -> float:
        """The time that it took, without waiting for a replica with room."""
        return self.ended - self.began


class GeneratedAnswer(KeptAnswer):
    """A streamed answer: its tokens, and when they came."""

    def __init__(self) -> None:
        super().__init__()
        self.text = ""
        self.ids: list[int] = []
        self.finish_reason: str | None = None
        self.error = b""
        self.broken = False
        self.times: list[float] = []  # of pieces with tokens, time.perf_counter's
        self._first = 0  # tokens of the first piece

    def feed(self, body: bytes) -> None:
        """Take whole events."""
        before = len(self.ids)
        try:
            for event in END.split(body):
                self._take(event)
        except UNEXPECTED:
            self.broken = True
        if len(self.ids) > before:
            self._first = self._first or len(self.ids)
            self.times.append(time.perf_counter())

    def _take(self, event: bytes) -> None:
        data = event_data(event) or {}
        if data.get("error") is not None:
            self.error = event_text(event)
        for choice in data.get("choices") or ():
            self.text += choice.get("text") or ""
            self.ids += token_ids(choice.get("token_ids") or [])
            self.finish_reason = choice.get("finish_reason") or self.finish_reason

    def as_json(self, reference: list[int]) -> dict[str, Any]:
        """Return the answer and its times in milliseconds; `reference`: the token ids to compare
        it with."""
        times = self.times
        later = len(self.ids) - self._first
        gaps = [b - a for a, b in pairwise(times)]
        return {
            "text": self.text,
            "token_ids": self.ids,
            "finish_reason": self.finish_reason,
            "ttft_ms": rounded_ms(times[0] - self.began) if times else None,
            "itl_ms": rounded_ms((times[-1] - times[0]) / later) if later else None,
            "itl_max_ms": rounded_ms(max(gaps)) if gaps else None,
            "duration_ms": rounded_ms(self.seconds),
            "first_difference": first_difference(self.ids, reference),
        }


def tokenized(body: bytes) -> list[int]:
    """Return the token ids in an answer of /tokenize.

    Raises:
        ValueError: there are none.
    """
    try:
        return token_ids(json.loads(body)["tokens"])
    except UNEXPECTED as error:
        raise ValueError from error


def token_ids(value: Any) -> list[int]:
    """Return what should be token ids.

    Raises:
        ValueError: they are none.
    """
    if not isinstance(value, list) or not all(type(i) is int and 0 <= i < 2**31 for i in value):
        raise ValueError
    return value


def rounded_ms(seconds: float) -> float:
    """Return seconds as milliseconds, to the microsecond."""
    return round(seconds * 1000, 3)


def first_difference(ids: list[int], others: list[int]) -> int | None:
    """Return the index of the first token that the two do not share; None if they are equal."""
    if ids == others:
        return None
    pairs = enumerate(zip(ids, others, strict=False))
    return next((i for i, (a, b) in pairs if a != b), min(len(ids), len(others)))


async def ask(
    proxy: Proxy, part: Exchange, name: str, fields: dict[str, Any], answer: KeptAnswer
) -> None:
    """POST `fields` to a model; the whole of its answer is in `answer` then, and is no error.

    Raises:
        ApiError: with the model's name in its message.
    """
    state = proxy.state
    body = to_json({**fields, "model": name})
    # The limits were applied to what the client sent: this is longer by the answer.
    prefix_chars = state.config.routing.prefix_chars
    request = read_request(body, route_of(fields), Limits(), prefix_chars)
    part.use_model(state.router, name)
    part.send = answer.send
    part.arrival = time.perf_counter()
    try:
        await proxy.forward(part, request)
    except ApiError as error:
        raise error.of_model(name) from None
    except asyncio.CancelledError:
        part.aborted = True
        raise
    answer.ended = time.perf_counter()
    answer.began = part.arrival + (part.queued or 0.0)
    if answer.status >= 400:
        raise ApiError.of_upstream(answer.status, answer.body).of_model(name)


async def generate(
    proxy: Proxy, part: Exchange, name: str, fields: dict[str, Any]
) -> GeneratedAnswer:
    """Have a model write an answer, streamed; `part.route` must be /v1/completions.

    Raises:
        ApiError: it did not, or not to the end.
    """
    options = {"stream": True, "stream_options": {"include_usage": True}, "return_token_ids": True}
    answer = GeneratedAnswer()
    await ask(proxy, part, name, {**fields, **options}, answer)
    if answer.error:
        raise ApiError.of_upstream(502, answer.error).of_model(name)
    if answer.broken or not answer.ids:
        raise unusable(name, "The model server does not say which tokens it wrote.")
    return answer


async def score(
    proxy: Proxy, part: Exchange, name: str, ids: list[int], start: int, top_k: int
) -> tuple[list[Position], float]:
    """Have a model read token ids; `part.route` must be /v1/completions.

    Returns:
        For each id from `start` on how likely it was, and which `top_k` would have been the
        likeliest; and the time that it took in seconds.

    Raises:
        ApiError: it cannot.
    """
    answer = KeptAnswer()
    fields = {
        "prompt": ids,
        "add_special_tokens": False,
        "max_tokens": 1,
        "temperature": 0,
        "prompt_logprobs": top_k,
    }
    with same_vocabulary():
        await ask(proxy, part, name, fields, answer)
    try:
        found = await proxy.state.bodies.read(positions, answer.body, ids, start)
    except ValueError as error:
        raise unusable(name, f"The model server's answer has {error}.") from None
    return found, answer.seconds


def unusable(name: str, why: str) -> ApiError:
    """Return the error where a model's answer lacks what was asked for."""
    return ApiError(502, f"{name}: {why}", code="upstream_unusable")


@contextmanager
def same_vocabulary() -> Iterator[None]:
    """Wrap requests with token ids of the reference: a model without one of them has another
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
