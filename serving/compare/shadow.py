"""Shadow scoring: other models read a sample of the reference's answers to clients.

How far they are from the reference goes into histograms. Nobody waits for it; docs/GATEWAY.md says
how it is configured.
"""

import asyncio
import logging
import random
import re
from collections.abc import Iterable
from typing import Any

from starlette.types import Message, Send

from serving.compare.kl import Drift, drift
from serving.compare.scoring import MISMATCH, check_vocabulary, score
from serving.config import ShadowScoring
from serving.exchange import Exchange
from serving.observability.metrics import Labels, Metrics
from serving.openai.errors import ApiError
from serving.openai.request import only_text, parse, with_fields
from serving.upstream.proxy import Proxy

log = logging.getLogger("attnserve")

# In JSON a quote inside a string is escaped, so these are only ever found outside of strings.
PROMPT_IDS = re.compile(rb'("prompt_token_ids"\s*:\s*)\[([\d,\s]*)\]')
ANSWER_IDS = re.compile(rb'("token_ids"\s*:\s*)\[([\d,\s]*)\]')
ID = re.compile(rb"\d{1,18}")

ONE_ANSWER = ("n", "best_of")
CHANGED = ("echo", "suffix", "use_beam_search", "prompt_embeds", "return_token_ids")
"""Fields with which the ids are not simply those of a prompt and what was written after it."""


class Shadow:
    """Takes samples and has them read."""

    def __init__(self, proxy: Proxy) -> None:
        self.state = proxy.state
        self.proxy = proxy
        self._running: set[asyncio.Task[None]] = set()

    def samples(self, config: ShadowScoring, model: str, raw: bytes) -> bool:
        """Return whether a request for `model` becomes a sample; `raw` is its body."""
        return (
            model == config.reference and random.random() < config.sample and suitable(parse(raw))
        )

    def offer(self, exchange: Exchange, tap: "Tap") -> None:
        """Have a sample read that has just been answered, unless there is no time for it now."""
        config = self.state.config.shadow
        good = tap.complete and exchange.code is None and tap.prompt and tap.answer
        if config is None or not good:
            return
        labels = {n: self.state.router.model(n).metrics(n).labels for n in config.models}
        if len(tap.prompt) + len(tap.answer) > config.max_tokens:
            self._count(labels.values(), "too_long")
        elif len(self._running) >= config.max_concurrent:
            self._count(labels.values(), "busy")
        else:
            task = asyncio.create_task(self._read(config, labels, exchange, tap))
            self._running.add(task)
            task.add_done_callback(self._running.discard)

    async def _read(
        self, config: ShadowScoring, labels: dict[str, Labels], exchange: Exchange, tap: "Tap"
    ) -> None:
        """Have one model after the other read a sample, the reference first."""
        left = dict(labels)
        ids, start = tap.prompt + tap.answer, len(tap.prompt)
        try:
            expected = None
            for i, name in enumerate((config.reference, *config.models)):
                if not self._has_room(name):
                    self._count(left.values(), "busy")
                    return
                part = exchange.part("/v1/completions", f"-shadow-{i}")
                found, _ = await score(self.proxy, part, name, ids, start, config.top_k)
                if expected is None:
                    expected = found
                    continue
                check_vocabulary(name, found, config.reference, expected)
                observe(self.state.metrics, labels[name], map(drift, expected, found))
                self._count([left.pop(name)], "read")
        except ApiError as error:
            self._count(left.values(), MISMATCH if error.code == MISMATCH else "failed")
            # Not its message: that may have some of the prompt.
            why = {"code": error.code, "status": error.status}
            log.warning("shadow scoring failed", extra={"models": [*left], **why})
        except Exception:
            self._count(left.values(), "failed")
            log.exception("shadow scoring failed")

    def _has_room(self, name: str) -> bool:
        """Return whether a model could take a request at once: clients go first."""
        model = self.state.router.model(name)
        waiting = self.state.router.queue_length(model)
        return waiting == 0 and any(r.has_room for r in model.usable(name))

    def _count(self, models: Iterable[Labels], result: str) -> None:
        for labels in models:
            self.state.metrics.shadow_answers.labels(*labels, result).inc()


def observe(metrics: Metrics, labels: Labels, drifts: Iterable[Drift]) -> None:
    """Count what a model makes of the tokens of one answer."""
    kl, delta = metrics.shadow_kl.labels(*labels), metrics.shadow_delta.labels(*labels)
    tokens = metrics.shadow_tokens.labels(*labels)
    disagreements = metrics.shadow_disagreements.labels(*labels)
    for found in drifts:
        kl.observe(found.kl)
        delta.observe(found.delta)
        tokens.inc()
        disagreements.inc(not found.agrees)


def suitable(fields: dict[str, Any]) -> bool:
    """Return whether an answer to this will be one list of ids after one list of ids."""
    if any(fields.get(name) not in (None, 1) for name in ONE_ANSWER):
        return False
    if any(fields.get(name) for name in CHANGED):
        return False
    if "messages" in fields:
        return only_text(fields["messages"])
    prompt = fields.get("prompt")
    return isinstance(prompt, str) or (
        isinstance(prompt, list) and all(type(id) is int for id in prompt)
    )


def with_token_ids(raw: bytes) -> bytes:
    """Return a suitable body that asks for token ids; all else is as the client wrote it."""
    return with_fields(raw, parse(raw), {"return_token_ids": True})


class Tap:
    """Stands before a client's `send`: takes the token ids out of an answer, for which the client
    did not ask, and keeps them. Everything goes on at once."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self._start: Message | None = None
        self.complete = False
        """The answer was good and has been sent to its end."""
        self.prompt: list[int] = []
        self.answer: list[int] = []

    async def send(self, message: Message) -> None:
        """Take a message for the client, and pass it on."""
        if message["type"] == "http.response.start":
            self._good = message["status"] == 200
            if any(name == b"content-length" for name, _ in message["headers"]):
                self._start = message  # until the length is known
            else:
                await self._send(message)
            return
        body = message["body"]
        if self._good and b'token_ids"' in body:
            body = PROMPT_IDS.sub(self._keep_prompt, body)
            body = ANSWER_IDS.sub(self._keep_answer, body)
            message = {**message, "body": body}
        if self._start is not None:
            headers = [(n, v) for n, v in self._start["headers"] if n != b"content-length"]
            headers.append((b"content-length", b"%d" % len(body)))
            await self._send({**self._start, "headers": headers})
            self._start = None
        await self._send(message)
        self.complete = self._good and not message["more_body"]

    def _keep_prompt(self, found: re.Match[bytes]) -> bytes:
        self.prompt += map(int, ID.findall(found[2]))
        return found[1] + b"null"

    def _keep_answer(self, found: re.Match[bytes]) -> bytes:
        self.answer += map(int, ID.findall(found[2]))
        return found[1] + b"null"
