"""What a configuration of the gateway says; `serving.config_file` reads one."""

import os
import re
from collections import Counter
from typing import Literal, Self

from pydantic import (
    AliasChoices,
    BaseModel,
    ConfigDict,
    Field,
    field_validator,
    model_validator,
)

from attnserve.errors import UserError
from serving.addresses import HostName, Origin, RedisUrl, Url, is_loopback


class ConfigError(UserError):
    """Why a configuration cannot be used, in one line."""


EVERY = "*"
"""The name of a model entry that takes every model that no other entry names."""


class Section(BaseModel):
    """A section of the configuration: unknown names are errors, so that a slip is seen."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", allow_inf_nan=False, use_attribute_docstrings=True
    )


class ModelEntry(Section):
    """A model, and the vLLM servers that serve it: its replicas, any of which may answer."""

    name: str = Field(min_length=1)
    """What clients ask for and the servers' --served-model-name; "*": every model not named
    elsewhere."""

    variant: str = ""
    """The attention variant, as a claim: an error where the servers say another."""

    bits: float | None = Field(None, gt=0)
    """Bits of a weight, as a claim: an error where the servers say others."""

    replicas: tuple[Url, ...] = Field(min_length=1)
    """The servers' addresses; a /v1 at the end is taken off."""

    prompt_price: float | None = Field(None, ge=0)
    """Price of a million tokens of prompts, for `cost_per_day`."""

    completion_price: float | None = Field(None, ge=0)
    """Price of a million tokens of answers."""

    api_key_env: str | None = None
    """The environment variable that has the servers' own API key."""

    @field_validator("api_key_env")
    @classmethod
    def _is_set(cls, name: str | None) -> str | None:
        key = os.environ.get(name) if name else "unused"
        if not key:
            raise ValueError("the environment has no such variable")
        if not re.fullmatch(r"[\x21-\x7e]+", key):
            raise ValueError("the variable has what can be no API key")
        return name

    @property
    def api_key(self) -> str | None:
        """The servers' own API key, which is in the environment and never in the file."""
        return os.environ[self.api_key_env] if self.api_key_env else None

    def cost(self, prompt_tokens: int, completion_tokens: int) -> float:
        """Return what so many tokens cost."""
        prompt, completion = self.prompt_price or 0.0, self.completion_price or 0.0
        return (prompt_tokens * prompt + completion_tokens * completion) / 1e6

    def most_cost(self, tokens: int) -> float:
        """Return what so many tokens cost at most, whichever they are."""
        return max(self.cost(tokens, 0), self.cost(0, tokens))

    @field_validator("replicas")
    @classmethod
    def _once(cls, replicas: tuple[str, ...]) -> tuple[str, ...]:
        if len(set(replicas)) < len(replicas):
            raise ValueError("the same address twice")
        return replicas


class KeyEntry(Section):
    """A client's key, and what it may use. `attnserve keys new NAME` writes one."""

    name: str = Field(pattern=r"^[\w.@-]{1,64}$")
    """Whose it is, for metrics and logs, which never have the key."""

    @field_validator("name")
    @classmethod
    def _is_no_secret(cls, name: str) -> str:
        if re.fullmatch(r"attnserve-[\w-]{43}|[0-9a-f]{64}", name):
            raise ValueError("is a key or a hash, which logs and metrics would show")
        return name

    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")
    """The key's SHA-256 in hexadecimal digits."""

    requests_per_minute: int | None = Field(None, gt=0)
    """Requests in a minute. None: no limit."""

    tokens_per_minute: int | None = Field(None, gt=0)
    """Tokens of prompts and answers in a minute. None: no limit."""

    tokens_per_day: int | None = Field(None, gt=0)
    """The same in a day. Counted anew after a restart. None: no limit."""

    cost_per_day: float | None = Field(None, gt=0)
    """What its tokens may cost in a day, by the models' prices. None: no limit."""

    max_concurrent: int | None = Field(None, gt=0)
    """Requests at a time. None: no limit."""

    @property
    def has_limits(self) -> bool:
        """Whether there is any."""
        names = type(self).model_fields.keys() - {"name", "sha256"}
        return any(getattr(self, name) is not None for name in names)


class Limits(Section):
    """What the gateway takes, and when it makes requests wait or turns them away."""

    max_connections: int | None = Field(None, gt=0)
    """Connections of clients at a time. None: half of the descriptors that the process may have
    (`ulimit -n`), less 64."""

    max_body_bytes: int = Field(4 * 1024 * 1024, gt=0)
    """Largest request body; larger ones get 413. Images need more."""

    max_held_bytes: int = Field(1024 * 1024 * 1024, gt=0)
    """Bytes of all request bodies in memory at a time; a request that would pass it gets 503."""

    max_prompt_chars: int | None = Field(None, gt=0)
    """Longest prompt, in characters (or token ids) over all messages. None: the model decides."""

    max_answer_bytes: int = Field(128 * 1024 * 1024, gt=0)
    """Largest answer of a server that is not streamed; for a larger one the client gets 502."""

    max_unread_bytes: int = Field(512 * 1024 * 1024, gt=0)
    """Bytes of all answers in memory at a time that clients have not read. Above it, clients that
    have read nothing for a second are cut off, the longest first; if there is none, an answer that
    is not streamed becomes 503."""

    max_compare_tokens: int = Field(4096, gt=0)
    """Longest prompt and answer of /v1/compare together, in tokens."""

    max_compare_total: int = Field(16384, gt=0)
    """Most tokens that all models of a comparison, the reference too, read together."""

    default_max_tokens: int = Field(2048, gt=0)
    """Tokens reserved for a chat's answer whose request sets no limit; for a key with a limit of
    tokens or cost, that is as long as the answer gets."""

    max_concurrent_per_replica: int | None = Field(None, gt=0)
    """Requests that this gateway has open at one server. None: no limit."""

    max_kv_usage: float = Field(0.95, gt=0, le=1)
    """A server whose KV cache is fuller (vllm:kv_cache_usage_perc) gets no further request."""

    max_waiting: int = Field(32, ge=0)
    """A server with more requests in its own queue (vllm:num_requests_waiting) gets none either."""

    queue_size: int = Field(256, ge=0)
    """Requests of one model that wait here for a server with room; others get 503."""

    queue_seconds: float = Field(30.0, gt=0)
    """Longest wait there; then 503."""


class Timeouts(Section):
    """Times in seconds."""

    head: float = Field(10.0, gt=0)
    """Longest time for a client to send a request's head, from its first byte or, if it is the
    first, from the connection; then 408."""

    body: float = Field(30.0, gt=0)
    """Longest time for the client to send its request's body; then 408."""

    connect: float = Field(5.0, gt=0)
    """Longest wait for a connection to a server."""

    read: float = Field(600.0, gt=0, validation_alias=AliasChoices("read", "silence"))
    """Longest wait for the next byte of an answer; without streaming, that is the whole of it."""

    total: float = Field(3600.0, gt=0)
    """Longest time for one answer, also if the client does not read it."""

    send: float = Field(60.0, gt=0)
    """How long a client may read nothing of an answer that waits for it; then it is cut off."""

    keep_alive: float = Field(75.0, gt=0)
    """How long a client's idle connection is kept: longer than clients do (aiohttp 15 s, a load
    balancer 60 s), so that it is they who close it and none sends into one just being closed."""

    idle: float = Field(4.0, gt=0)
    """How long a connection to a server is kept: less than the server does (vLLM: 5 s), because a
    request sent to one just being closed is lost."""

    drain: int = Field(60, ge=0)
    """How long running requests may go on after SIGTERM."""


class Health(Section):
    """Health checks: /health and /metrics of every server, asked for again and again."""

    every: float = Field(1.0, gt=0)
    """Seconds between two health checks."""

    timeout: float = Field(2.0, gt=0)
    """Longest wait for an answer, in seconds."""

    failures: int = Field(3, gt=0)
    """Failed health checks after which a server gets no requests while others can take them."""


class Breaker(Section):
    """A server that fails requests is left alone for a while, then tried with one."""

    failures: int = Field(3, gt=0)
    """Failures in a row that open the circuit."""

    open_seconds: float = Field(5.0, gt=0)
    """How long it stays open; doubled, up to eight times, while the one that tries fails."""


class Routing(Section):
    """Which of a model's servers with room gets a request."""

    policy: Literal["prefix", "least_loaded"] = "prefix"
    """prefix: the same beginning of a prompt goes to the same server, whose prefix cache has it,
    unless that is overloaded."""

    prefix_chars: int = Field(256, gt=0)
    """How much of a prompt counts as its beginning, in characters (or token ids)."""

    overload: float = Field(1.5, ge=1)
    """A server is overloaded that has this many times the average load."""

    retries: int = Field(2, ge=0)
    """Further servers that are tried while nothing has been sent to the client and the request has
    not run; after a crash, one."""


class ShadowScoring(Section):
    """Shadow scoring: other models read a sample of the answers of one model to clients."""

    reference: str = Field(min_length=1)
    """The model whose answers are read."""

    models: tuple[str, ...] = Field(min_length=1)
    """The models that read them; the same vocabulary is needed."""

    sample: float = Field(0.01, ge=0, le=1)
    """The share of answers that is read."""

    max_concurrent: int = Field(1, gt=0)
    """Answers that are read at a time; what comes meanwhile is not."""

    max_tokens: int = Field(512, gt=1)
    """Longest prompt and answer together; longer ones are not read."""

    top_k: int = Field(5, gt=0)
    """Most likely tokens of each position that are compared (vLLM's limit is 20)."""


class Logging(Section):
    """JSON lines on stderr."""

    level: Literal["debug", "info", "warning", "error"] = "info"
    """The least severe line that is written."""

    requests: bool = True
    """A line for each request: who, what, how long; never keys, prompts or answers."""


class Config(Section):
    """Everything that a configuration can say."""

    host: str = Field("127.0.0.1", min_length=1)
    """The address to listen on; needs a restart."""

    port: int = Field(8080, ge=1, le=65535)
    """The port to listen on; needs a restart."""

    models: tuple[ModelEntry, ...] = Field(min_length=1)
    keys: tuple[KeyEntry, ...] = ()
    """Whose key is among them is let in. Without `keys`, every client may use everything."""

    open: bool = False
    """Needed with `keys: []`, to remove the last key, and to lend servers' own keys to clients
    without one."""

    protect_metrics: bool | None = None
    """/metrics asks for a key, too. None: where there are keys, unless `host` is loopback's."""

    allowed_hosts: tuple[HostName, ...] = ()
    """Names that clients may call the gateway by ("*.example.com": all below it; "*": any), without
    a port. Where `host` is loopback's, its own names go without saying; elsewhere IP addresses do,
    and none means any."""

    cors_origins: tuple[Origin, ...] = ()
    """Origins of web pages that may use the gateway from a browser; "*": any."""

    redis: RedisUrl | None = None
    """Redis or Valkey that has what keys have used, for several gateways with one budget:
    redis://HOST:6379, rediss: (TLS) or unix:; needs a restart."""

    redis_down: Literal["refuse", "local"] = "refuse"
    """What becomes of requests of keys with limits while that is gone: 503, or each gateway holds
    them to the limits by itself."""

    playground: bool = True
    """The web page at /playground. It has no rights of its own: it asks its user for a key."""

    limits: Limits = Limits()
    timeouts: Timeouts = Timeouts()
    health: Health = Health()
    breaker: Breaker = Breaker()
    routing: Routing = Routing()
    shadow: ShadowScoring | None = None
    """None: no answer is read by another model."""

    logging: Logging = Logging()

    _signature: tuple[int, ...] | None = None

    @property
    def signature(self) -> tuple[int, ...] | None:
        """Of the file, as it was when this was read from it."""
        return self._signature

    @model_validator(mode="after")
    def _names_are_clear(self) -> Self:
        for what, names in (
            ("models", [m.name for m in self.models]),
            ("keys", [k.name for k in self.keys]),
            ("shadow.models", list(self.shadow.models) if self.shadow else []),
        ):
            for name, times in Counter(names).items():
                if times > 1:
                    raise ValueError(f"{what} has {name} twice")
        hashes = Counter(k.sha256 for k in self.keys)
        for key in self.keys:
            if hashes[key.sha256] > 1:
                raise ValueError(f"keys has the key of {key.name} twice")
            if key.cost_per_day and any(
                None in (m.prompt_price, m.completion_price) for m in self.models
            ):
                raise ValueError(f"cost_per_day of {key.name} needs a price for every model")
        served = {m.name for m in self.models}
        for name in (self.shadow.reference, *self.shadow.models) if self.shadow else ():
            if name not in served and EVERY not in served:
                raise ValueError(f"shadow names {name}, which is none of the models")
        return self

    @model_validator(mode="after")
    def _is_meant_to_be_open(self) -> Self:
        if self.keys and self.open:
            raise ValueError("open: true and keys contradict each other")
        if not self.keys and not self.open:
            if "keys" in self.model_fields_set:
                raise ValueError("keys is empty; `open: true` lets every client in")
            if any(model.api_key_env for model in self.models):
                raise ValueError("api_key_env needs keys, or `open: true`, which lends it to all")
        if self.protect_metrics and not self.keys:
            raise ValueError("protect_metrics needs keys")
        return self

    def without_secrets(self) -> Self:
        """Return a configuration that has no keys and no Redis, and else is the same."""
        return self.model_copy(update={"keys": (), "redis": None})

    def check_workers(self) -> None:
        """Refuse limits that several processes would each give away in full.

        Raises:
            ConfigError: a key has limits, and there is no Redis that has what all have used.
        """
        for key in self.keys:
            if self.redis is None and key.has_limits:
                raise ConfigError(f"several workers need `redis:` for the limits of {key.name}")

    @property
    def metrics_need_key(self) -> bool:
        """Whether /metrics, with its addresses of servers and names of keys, is not for all."""
        if self.protect_metrics is None:
            return bool(self.keys) and not is_loopback(self.host)
        return self.protect_metrics
