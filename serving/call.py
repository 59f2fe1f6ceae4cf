"""One request on its way through the gateway: what is known of it, for metrics and its log line."""

import re
import time
import uuid
from typing import Any

from starlette.types import Scope

from serving.observability.metrics import ModelMetrics
from serving.rate_limit import Account
from serving.upstream.router import Model

REQUEST_ID = re.compile(rb"[\x21-\x7e]{1,128}")


class Call:
    """Filled in as the request goes on."""

    __slots__ = (
        "aborted",
        "account",
        "arrival",
        "authorization",
        "code",
        "completion_tokens",
        "counts",
        "first_token",
        "headers",
        "model",
        "model_name",
        "parts",
        "prompt_tokens",
        "queued",
        "replica",
        "request_id",
        "reserved",
        "retries",
        "route",
        "span",
        "stage",
        "status",
        "usage_known",
    )

    def __init__(self, scope: Scope) -> None:
        self.arrival = time.perf_counter()
        self.route: str = scope["path"]
        self.headers: list[tuple[bytes, bytes]] = scope["headers"]
        self.authorization = b""
        given = b""
        for name, value in self.headers:
            if name == b"x-request-id":
                given = value
            elif name == b"authorization":
                self.authorization = value
        usable = REQUEST_ID.fullmatch(given)
        self.request_id = given if usable else uuid.uuid4().hex.encode()
        self.status = 0  # of what has been sent to the client; 0: nothing yet
        self.code: str | None = None  # of an error of our own
        self.account: Account | None = None
        self.reserved: int | None = None
        self.model: Model | None = None
        self.model_name = ""
        self.counts: ModelMetrics | None = None
        self.replica: str | None = None
        self.retries = 0
        self.stage = "body"
        self.aborted = False
        self.queued: float | None = None
        self.first_token: float | None = None
        self.prompt_tokens = 0
        self.completion_tokens = 0
        self.usage_known = False
        self.span: Any = None
        self.parts: list[Call] | tuple[()] = ()  # what was asked of models to answer this one

    @property
    def id_header(self) -> tuple[bytes, bytes]:
        """The request's id for the client."""
        return (b"x-request-id", self.request_id)

    def part(self, route: str, suffix: str) -> "Call":
        """A request to a model server for this one, under its client's headers and its id with a
        suffix (two requests of one id are an error in vLLM)."""
        part = Call({"path": route, "headers": self.headers})
        part.request_id = self.request_id + suffix.encode("ascii")
        part.span = self.span
        return part

    def used(self) -> tuple[int, int]:
        """Tokens of prompt and answer, as far as a server has worked on them."""
        answered = self.usage_known or (
            self.replica is not None and (self.aborted or self.first_token)
        )
        return (self.prompt_tokens, self.completion_tokens) if answered else (0, 0)

    def fields(self, seconds: float) -> dict[str, Any]:
        """The log line: who asked for what, who answered, and how it went."""
        return {
            "request_id": self.request_id.decode("ascii"),
            "route": self.route,
            "key": self.account.name if self.account else None,
            "model": self.model_name or None,
            "variant": self.model.labels[0] or None if self.model else None,
            "bits": self.model.bits if self.model else None,
            "replica": self.replica,
            "status": self.status,
            "code": self.code,
            "aborted": self.stage if self.aborted else None,
            "retries": self.retries or None,
            "queue_ms": milliseconds(self.queued),
            "ttft_ms": milliseconds(self.first_token),
            "duration_ms": milliseconds(seconds),
            "prompt_tokens": self.prompt_tokens or None,
            "completion_tokens": self.completion_tokens or None,
        }


def milliseconds(seconds: float | None) -> float | None:
    """For a log line."""
    return None if seconds is None else round(seconds * 1000, 2)
