"""One request of a client and its answer: what is known of it, and how the answer is sent."""

import json
import os
import re
import time
from dataclasses import dataclass, field
from typing import Any

from starlette.types import Scope, Send

from serving.client import body_is_missing, hold_next, write_answer
from serving.observability.metrics import ModelMetrics
from serving.openai.errors import ApiError, printable
from serving.rate_limit import Account, Reservation
from serving.upstream.http import Headers
from serving.upstream.router import Model, Router

JSON = (b"content-type", b"application/json")
CLOSE = (b"connection", b"close")
REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


@dataclass(slots=True, eq=False)
class Exchange:
    """A request on its way through the gateway; attributes are filled in as they become known."""

    route: str
    headers: Headers
    """Of the client; without its key once that has been recognised."""
    by_name: dict[bytes, bytes]
    """The same, of several of a name the last; with the key."""
    id_header: tuple[bytes, bytes]
    """The request's id, for the client and for model servers."""
    send: Send
    """Takes the messages of the answer."""
    cors: Headers = field(default_factory=list)
    """What the answer says to a browser."""
    query: bytes = b""
    """What comes behind the route's "?"."""
    held_bytes: int = 0
    """Of its body, so far."""
    span: Any = None
    """The request's span, where there are traces."""
    arrival: float = field(default_factory=time.perf_counter)
    account: Account | None = None
    """What the client's key has used; None where no key is needed."""
    reservation: Reservation | None = None
    """What the account has reserved for the request."""
    model: Model | None = None
    model_name: str = ""
    metrics: ModelMetrics | None = None
    replica: str | None = None
    """The address of the last replica that was asked."""
    retries: int = 0
    stage: str = "body"
    """What it waits for, by which it is counted if its client leaves."""
    aborted: bool = False
    status: int = 0
    """The HTTP status that the client has been sent; 0: nothing has been sent yet."""
    code: str | None = None
    """The code of the error that it ended with: the gateway's own, or "upstream_error" for one that
    a server has sent inside a stream."""
    upstream_error: str | None = None
    """Why the last replica that failed it did so, also where another one has answered."""
    upstream_status: int | None = None
    """The status of an error that a server has sent inside a stream."""
    queued: float | None = None
    """Seconds that it waited for a replica with room."""
    first_token: float | None = None
    """Seconds from its arrival to the first event with tokens."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0
    """What its tokens cost, by the models' prices."""
    usage_known: bool = False
    unseen_tokens: int = 0
    """What a server may have written beyond that while it waited for a client that did not read:
    its key pays for it."""
    parts: list["Exchange"] = field(default_factory=list)
    """The gateway's own requests to models to answer this one."""

    @classmethod
    def begin(cls, scope: Scope, send: Send) -> "Exchange":
        """Return the exchange of an ASGI request that has just come."""
        headers: Headers = scope["headers"]
        by_name = dict(headers)
        request_id = by_name.get(b"x-request-id", b"")
        if not REQUEST_ID.fullmatch(request_id):
            request_id = os.urandom(16).hex().encode()
        id_header = (b"x-request-id", request_id)
        return cls(scope["path"], headers, by_name, id_header, send, query=scope["query_string"])

    def part(self, route: str, suffix: str) -> "Exchange":
        """Return an exchange of the gateway's own with a model server, to answer this one.

        It has the client's headers, and the request's id with a suffix: two requests of one id are
        an error in vLLM.
        """
        name, own_id = self.id_header
        id_header = (name, own_id + suffix.encode("ascii"))
        return Exchange(route, self.headers, {}, id_header, self.send, span=self.span)

    def use_model(self, router: Router, name: str) -> Model:
        """Look up and return the model that the request asks for.

        Raises:
            ApiError: 404; there is none of this name.
        """
        self.model, self.model_name = router.model(name), name
        self.metrics = self.model.metrics(name)
        return self.model

    @property
    def request_id(self) -> str:
        """The client's own id of the request if it sent a usable one."""
        return self.id_header[1].decode("ascii")

    async def start(self, status: int, headers: Headers) -> None:
        """Send the head of the answer, of which something of the body has to be sent next."""
        self.status = status
        headers = self._with_own(headers)
        hold_next(self.send)
        await self.send({"type": "http.response.start", "status": status, "headers": headers})

    def _with_own(self, headers: Headers) -> Headers:
        """Return the headers of an answer with the gateway's own."""
        headers = [*headers, self.id_header, *self.cors]
        if self.account is not None:
            headers += self.account.headers()
        if body_is_missing(self.send):
            headers.append(CLOSE)
        return headers

    async def answer(self, status: int, headers: Headers, content: bytes) -> None:
        """Send an answer in one piece."""
        headers = [*headers, (b"content-length", b"%d" % len(content))]
        if write_answer(self.send, status, self._with_own(headers), content):
            self.status = status
            return
        await self.start(status, headers)
        await self.send({"type": "http.response.body", "body": content, "more_body": False})

    async def fail(self, error: ApiError) -> None:
        """Answer with an error, or end a stream that has begun with one and without [DONE]."""
        self.code = error.code
        body = json.dumps(error.body).encode()
        if self.status:
            last = b"data: %b\n\n" % body
            await self.send({"type": "http.response.body", "body": last, "more_body": False})
        else:
            await self.answer(error.status, [JSON, *error.headers()], body)

    async def reserve(self, tokens: int, cost: float) -> None:
        """Reserve the most that the request can take, where its client has a key.

        Raises:
            ApiError: 429; the key's limits do not allow it.
        """
        if self.account is not None:
            self.reservation = await self.account.reserve(tokens, cost)

    def note_usage(self, usage: tuple[int, int] | None) -> None:
        """Take over the tokens of prompt and answer, if a server has said them."""
        if usage is not None:
            self.prompt_tokens, self.completion_tokens = usage
            self.usage_known = True

    def settle(self) -> int:
        """Count the tokens of the request for its models and its key; return how many they are."""
        prompts = answers = unseen = 0
        for part in self.parts or (self,):
            prompt, completion = part.used()
            if part.metrics is not None:
                part.metrics.prompt_tokens.inc(prompt)
                part.metrics.completion_tokens.inc(completion)
            if part.model is not None:
                self.cost += part.model.entry.cost(prompt, completion)
            prompts, answers = prompts + prompt, answers + completion
            unseen += part.unseen_tokens
        self.prompt_tokens, self.completion_tokens = prompts, answers
        tokens = prompts + answers + unseen
        if unseen and self.model is not None:
            self.cost += self.model.entry.cost(0, unseen)
        if self.account is not None and self.reservation is not None:
            self.account.settle(self.reservation, tokens, self.cost)
        return tokens

    def used(self) -> tuple[int, int]:
        """Return the tokens of prompt and answer that a server has worked on."""
        answered = self.usage_known or (
            self.replica is not None and (self.aborted or self.first_token)
        )
        return (self.prompt_tokens, self.completion_tokens) if answered else (0, 0)

    def log_fields(self, seconds: float) -> dict[str, Any]:
        """Return the log line: who asked for what, who answered, and how it went."""
        return {
            "request_id": self.request_id,
            "route": self.route,
            "key": self.account.name if self.account else None,
            "model": printable(self.model_name) or None,
            "variant": self.model.labels[0] or None if self.model else None,
            "bits": self.model.bits if self.model else None,
            "replica": self.replica,
            "status": self.status,
            "code": self.code,
            "upstream_error": self.upstream_error,
            "upstream_status": self.upstream_status,
            "aborted": self.stage if self.aborted else None,
            "retries": self.retries or None,
            "queue_ms": milliseconds(self.queued),
            "ttft_ms": milliseconds(self.first_token),
            "duration_ms": milliseconds(seconds),
            "prompt_tokens": self.prompt_tokens or None,
            "completion_tokens": self.completion_tokens or None,
            "cost": self.cost or None,
        }


def milliseconds(seconds: float | None) -> float | None:
    """Return seconds as milliseconds with two decimals."""
    return None if seconds is None else round(seconds * 1000, 2)
