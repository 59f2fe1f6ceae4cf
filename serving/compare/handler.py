"""`POST /v1/compare`: one model writes an answer, the others read the same token ids.

docs/GATEWAY.md, "Compare", has the request, the answer and what each figure means.
"""

import asyncio
import json
import time
import uuid
from collections.abc import Coroutine
from dataclasses import dataclass
from typing import Any, TypeVar

from starlette.types import Scope, Send

from serving.call import Call
from serving.compare.kl import Position, drift, summary
from serving.compare.request import Comparison
from serving.compare.scoring import (
    Kept,
    Written,
    ask,
    check_vocabulary,
    milliseconds,
    read,
    same_vocabulary,
    write,
)
from serving.handler import Route
from serving.openai.errors import ApiError
from serving.openai.response import JSON, whole
from serving.upstream.http import timed_out
from serving.upstream.kv import kv_cache
from serving.upstream.vllm_metrics import Description

COMPARE = "/v1/compare"

T = TypeVar("T")


class Compare(Route):
    """An ASGI application for COMPARE."""

    async def respond(self, call: Call, raw: bytes, scope: Scope, send: Send) -> None:
        """Compare, and answer in one piece."""
        gateway = self.gateway
        asked = Comparison(raw, gateway.config)
        for name in asked.models:
            gateway.model(name)
        call.model = gateway.model(asked.reference)
        call.model_name = asked.reference
        call.counts = gateway.counts(call.model, asked.reference)
        if call.account is not None:
            call.account.reserve(asked.tokens)
            call.reserved = asked.tokens
        call.stage = "whole"
        run = Run(self, call, asked)
        try:
            async with asyncio.timeout(gateway.config.timeouts.total):
                answer = await run.answer()
        except TimeoutError:
            raise timed_out() from None
        finally:
            call.parts = run.parts
            call.retries = sum(part.retries for part in run.parts)
        await whole(call, 200, [JSON], answer, send)


@dataclass
class Side:
    """What is known of one model."""

    name: str
    positions: list[Position]
    seconds: float  # that the reading took
    kv: dict[str, Any]
    known: Description  # of the server that has read
    written: Written | None = None


class Run:
    """One comparison; `parts` are the requests that it has made."""

    def __init__(self, route: Compare, call: Call, asked: Comparison) -> None:
        self.gateway = route.gateway
        self.forward = route.forward
        self.call = call
        self.asked = asked
        self.parts: list[Call] = []

    async def answer(self) -> bytes:
        """The answer's JSON.

        Raises:
            ApiError: a model failed, or the models cannot be compared.
        """
        asked = self.asked
        prompt = await self._prompt_ids()
        asked.check_length(len(prompt) + asked.max_tokens)
        first = await self._write(asked.reference, prompt)
        with same_vocabulary():  # the reference knows the prompt's tokens
            # One after the other, so that none slows down another.
            others = [
                await self._write(n, prompt) if asked.generate else None for n in asked.models
            ]
        names = (asked.reference, *asked.models)
        sides = await together([self._read(name, prompt, first.ids) for name in names])
        for side, written in zip(sides, (first, *others), strict=True):
            side.written = written
        # One by one and in a thread, so that streams go on: nothing else runs during a json.dumps.
        reference, *models = [await asyncio.to_thread(self._json, s, sides[0]) for s in sides]
        prompt_tokens, completion_tokens = map(
            sum, zip(*(p.used() for p in self.parts), strict=True)
        )
        short = {
            "id": self.call.request_id.decode("ascii"),
            "object": "compare",
            "created": int(time.time()),
            "top_k": asked.top_k,
            "prompt_token_ids": prompt,
            "usage": {
                "prompt_tokens": prompt_tokens,
                "completion_tokens": completion_tokens,
                "total_tokens": prompt_tokens + completion_tokens,
            },
        }
        start = json.dumps(short).encode().removesuffix(b"}")
        return b'%b, "reference": %b, "models": [%b]}' % (start, reference, b", ".join(models))

    def _part(self, route: str) -> Call:
        part = self.call.part(route, f"-{len(self.parts) + 1}")
        self.parts.append(part)
        return part

    async def _prompt_ids(self) -> list[int]:
        """The prompt's token ids, by the reference's tokenizer if need be."""
        if isinstance(self.asked.prompt, list):
            return self.asked.prompt
        answer = Kept()
        fields = self.asked.to_tokenize
        await ask(self.forward, self._part("/tokenize"), self.asked.reference, fields, answer)
        try:
            return [int(id) for id in json.loads(answer.body)["tokens"]]
        except (ValueError, KeyError, TypeError):
            message = (
                f"{self.asked.reference}: The model server does not say what tokens these are."
            )
            raise ApiError(502, message, code="upstream_unusable") from None

    async def _write(self, name: str, prompt: list[int]) -> Written:
        # A salt of its own: no server finds the prompt in its prefix cache.
        fields = {"cache_salt": uuid.uuid4().hex, **self.asked.sampling, "prompt": prompt}
        return await write(self.forward, self._part("/v1/completions"), name, fields)

    async def _read(self, name: str, prompt: list[int], ids: list[int]) -> Side:
        part = self._part("/v1/completions")
        all_ids = prompt + ids
        found, seconds = await read(
            self.forward, part, name, all_ids, len(prompt), self.asked.top_k
        )
        kv = await kv_cache(self.gateway.replicas.get(part.replica or ""))
        return Side(name, found, seconds, kv, self.gateway.model(name).server(part.replica))

    def _json(self, side: Side, reference: Side) -> bytes:
        """What the answer says of a model, or of the reference itself.

        Raises:
            ApiError: 400; its vocabulary is another.
        """
        if side is reference:
            return json.dumps(self._reference(side)).encode()
        check_vocabulary(side.name, side.positions, reference.name, reference.positions)
        return json.dumps(self._model(side, reference)).encode()

    def _reference(self, side: Side) -> dict[str, Any]:
        tokens = [
            {
                "id": p.id,
                "token": p.texts[p.id],
                "logprob": p.logprob,
                "top": p.top(self.asked.top_k),
            }
            for p in side.positions
        ]
        return self._of_all(side, side) | {"tokens": tokens}

    def _model(self, side: Side, reference: Side) -> dict[str, Any]:
        drifts = [drift(a, b) for a, b in zip(reference.positions, side.positions, strict=True)]
        tokens = [
            {"logprob": p.logprob, **d._asdict(), "top": p.top(self.asked.top_k)}
            for p, d in zip(side.positions, drifts, strict=True)
        ]
        return self._of_all(side, reference) | {"tokens": tokens, "summary": summary(drifts)}

    def _of_all(self, side: Side, reference: Side) -> dict[str, Any]:
        ids = [p.id for p in reference.positions]
        return {
            "model": side.name,
            **side.known.json(),
            "generation": side.written.figures(ids) if side.written else None,
            "score_ms": milliseconds(side.seconds),
            "kv": side.kv,
        }


async def together(coroutines: list[Coroutine[Any, Any, T]]) -> list[T]:
    """All results; the first that fails ends the others, and its error comes out."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
