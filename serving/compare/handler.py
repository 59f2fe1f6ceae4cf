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

from serving.compare.kl import Position, drift, summary
from serving.compare.request import ComparisonRequest
from serving.compare.scoring import (
    GeneratedAnswer,
    KeptAnswer,
    ask,
    check_vocabulary,
    generate,
    rounded_ms,
    same_vocabulary,
    score,
    tokenized,
    unusable,
)
from serving.exchange import JSON, Exchange
from serving.upstream.http import timed_out
from serving.upstream.proxy import Proxy, api_error
from serving.upstream.vllm_metrics import Description, kv_cache_sizes

T = TypeVar("T")


async def compare(proxy: Proxy, exchange: Exchange, raw: bytes) -> None:
    """Answer a request with the body `raw`, in one piece.

    Raises:
        ApiError: a model failed, or the models cannot be compared.
    """
    state = proxy.state
    asked = await state.bodies.read(ComparisonRequest, raw, state.config.without_secrets())
    names = (asked.reference, *asked.models)
    entries = [state.router.model(name).entry for name in names]
    exchange.use_model(state.router, asked.reference)
    await exchange.reserve(asked.tokens, max(e.most_cost(asked.tokens) for e in entries))
    exchange.stage = "whole"
    try:
        async with asyncio.timeout(state.config.timeouts.total):
            answer = await ModelComparison(proxy, exchange, asked).answer()
    except TimeoutError:
        raise api_error(timed_out()) from None
    finally:
        exchange.retries = sum(part.retries for part in exchange.parts)
    await exchange.answer(200, [JSON], answer)


@dataclass
class Reading:
    """What one model made of the tokens."""

    name: str
    positions: list[Position]
    seconds: float  # that the reading took
    kv: dict[str, Any]
    server: Description
    generated: GeneratedAnswer | None = None


class ModelComparison:
    """One comparison; the requests that it makes are the exchange's parts."""

    def __init__(self, proxy: Proxy, exchange: Exchange, asked: ComparisonRequest) -> None:
        self.state = proxy.state
        self.proxy = proxy
        self.exchange = exchange
        self.asked = asked

    async def answer(self) -> bytes:
        """Return the answer's JSON.

        Raises:
            ApiError: a model failed, or the models cannot be compared.
        """
        asked = self.asked
        prompt = await self._prompt_ids()
        asked.check_length(len(prompt) + asked.max_tokens)
        first = await self._generate(asked.reference, prompt)
        with same_vocabulary():  # the reference knows the prompt's tokens
            # One after the other, so that none slows down another.
            others = [
                await self._generate(n, prompt) if asked.generate else None for n in asked.models
            ]
        names = (asked.reference, *asked.models)
        readings = await together([self._read(name, prompt, first.ids) for name in names])
        for reading, generated in zip(readings, (first, *others), strict=True):
            reading.generated = generated
        # One by one and in a thread, so that streams go on: nothing else runs during a json.dumps.
        reference, *models = [
            await asyncio.to_thread(self._json, reading, readings[0]) for reading in readings
        ]
        used = [part.used() for part in self.exchange.parts]
        prompt_tokens, completion_tokens = (sum(tokens) for tokens in zip(*used, strict=True))
        head = {
            "id": self.exchange.request_id,
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
        start = json.dumps(head).encode().removesuffix(b"}")
        return b'%b, "reference": %b, "models": [%b]}' % (start, reference, b", ".join(models))

    def _part(self, route: str = "/v1/completions") -> Exchange:
        part = self.exchange.part(route, f"-{len(self.exchange.parts) + 1}")
        self.exchange.parts.append(part)
        return part

    async def _prompt_ids(self) -> list[int]:
        """Return the prompt's token ids, by the reference's tokenizer if need be."""
        asked = self.asked
        if asked.prompt is not None:
            return asked.prompt
        answer = KeptAnswer()
        part = self._part("/tokenize")
        await ask(self.proxy, part, asked.reference, asked.to_tokenize, answer)
        try:
            return await self.state.bodies.read(tokenized, answer.body)
        except ValueError:
            why = "The model server does not say what tokens these are."
            raise unusable(asked.reference, why) from None

    async def _generate(self, name: str, prompt: list[int]) -> GeneratedAnswer:
        # A salt of its own: no server finds the prompt in its prefix cache.
        fields = {"cache_salt": uuid.uuid4().hex, **self.asked.sampling, "prompt": prompt}
        return await generate(self.proxy, self._part(), name, fields)

    async def _read(self, name: str, prompt: list[int], ids: list[int]) -> Reading:
        part = self._part()
        positions, seconds = await score(
            self.proxy, part, name, prompt + ids, len(prompt), self.asked.top_k
        )
        replica = self.state.replicas.get(part.replica or "")
        kv = await replica.kv_cache() if replica else kv_cache_sizes(b"")
        server = self.state.router.model(name).server(part.replica)
        return Reading(name, positions, seconds, kv, server)

    def _json(self, reading: Reading, reference: Reading) -> bytes:
        """Return what the answer says of a model, or of the reference itself.

        Raises:
            ApiError: 400; its vocabulary is another.
        """
        found = {
            "model": reading.name,
            **reading.server.as_json(),
            "generation": reading.generated.as_json([p.id for p in reference.positions])
            if reading.generated
            else None,
            "score_ms": rounded_ms(reading.seconds),
            "kv": reading.kv,
        }
        tokens: list[dict[str, Any]] = [
            {"logprob": p.logprob, "top": p.top(self.asked.top_k)} for p in reading.positions
        ]
        if reading is reference:
            for token, p in zip(tokens, reading.positions, strict=True):
                token |= {"id": p.id, "token": p.texts[p.id]}
        else:
            check_vocabulary(reading.name, reading.positions, reference.name, reference.positions)
            drifts = list(map(drift, reference.positions, reading.positions))
            for token, d in zip(tokens, drifts, strict=True):
                token |= d._asdict()
            found["summary"] = summary(drifts)
        return json.dumps({**found, "tokens": tokens}).encode()


async def together(coroutines: list[Coroutine[Any, Any, T]]) -> list[T]:
    """Return all results; the first that fails ends the others, and its error comes out."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except BaseExceptionGroup as errors:
        raise errors.exceptions[0] from None
    return [task.result() for task in tasks]
