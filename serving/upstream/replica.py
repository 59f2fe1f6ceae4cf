"""One vLLM server: its connections, its health, its load and its circuit breaker."""

import contextlib
import logging
import time
from dataclasses import asdict
from typing import Any

from serving.config import Config
from serving.upstream.http import Headers, UpstreamError
from serving.upstream.pool import ConnectionPool
from serving.upstream.vllm_metrics import (
    UNKNOWN,
    ServerInfo,
    context_lengths,
    kv_cache_sizes,
    load_gauges,
    parse_info,
)

log = logging.getLogger("attnserve")

MAX_PAGE_BYTES = 16 * 1024 * 1024
"""Largest answer to a GET that is taken from a server: its metrics, its list of models."""


class Replica:
    """A server, by its address; it outlives a change of configuration that still names it."""

    def __init__(self, url: str, config: Config, api_key: str | None = None) -> None:
        self.url = url
        self.pool = ConnectionPool(url, config.timeouts.idle, api_key)
        self.config = config
        self.in_flight = 0  # requests that this gateway has open here
        self.draining = False
        self.healthy: bool | None = None  # None: not checked yet
        self.info: ServerInfo = UNKNOWN  # what it said at the last check that it could answer
        self.kv_usage: float | None = None  # a fraction; None: not known
        self.kv_bytes: int | None = None  # of the whole cache
        self.waiting: float | None = None
        self.models: dict[str, int] | None = None  # that it lists, and their contexts' lengths
        self.lacks: set[str] = set()  # names that it has answered "no such model" to
        self.ask_models = True  # at the next check
        self._others = 0.0  # requests of other clients here, at the last check
        self._failed_checks = 0  # in a row
        self._failures = 0  # requests that failed in a row
        self._opened = 0  # times that the circuit has opened since it was closed
        self._open_until = 0.0
        self._tested = False  # a request tests whether the half-open circuit may close

    # Health

    async def check_health(self) -> None:
        """Ask for /health and /metrics once, and take over what they say."""
        try:
            healthy = (await self.get("/health"))[0] == 200
            if healthy:
                status, page = await self.get("/metrics")
                self._note_metrics(page if status == 200 else None)
                if self.ask_models or self.lacks or not self.healthy:
                    await self._check_models()
        except UpstreamError:
            healthy = False
        self._failed_checks = 0 if healthy else self._failed_checks + 1
        if healthy or self.healthy is None or self._failed_checks >= self.config.health.failures:
            if healthy != self.healthy:
                log.log(
                    logging.INFO if healthy else logging.WARNING,
                    "replica is %s",
                    "healthy" if healthy else "not healthy",
                    extra={"replica": self.url},
                )
            if healthy and not self.healthy:
                self._open_until = 0.0  # one request may test it at once
            self.healthy = healthy

    async def _check_models(self) -> None:
        """Ask which models it lists; one that it lacked may be asked for again then, or where it
        does not say."""
        self.ask_models, page = False, b""
        with contextlib.suppress(UpstreamError):
            _, page = await self.get("/v1/models")
        self.models = context_lengths(page)
        self.lacks = {n for n in self.lacks if self.models is not None and n not in self.models}

    def note_lack(self, name: str) -> None:
        """Take it out of a model's rotation: it has answered that it does not have the model."""
        if name not in self.lacks:
            self.lacks.add(name)
            log.warning("replica lacks the model", extra={"replica": self.url, "model": name})

    async def is_healthy(self) -> bool:
        """Return whether it answers /health now.

        A server whose engine has died says 500 to what it was doing, as it does to a request that
        it cannot serve; this tells them apart.
        """
        try:
            status, _ = await self.get("/health")
        except UpstreamError:
            return False
        return status == 200

    def _note_metrics(self, page: bytes | None) -> None:
        """Take over what its /metrics page says; None: it has none."""
        gauges = load_gauges(page or b"")
        self.kv_usage, self.waiting = gauges.kv_usage, gauges.waiting
        self.kv_bytes = kv_cache_sizes(page or b"")["cache_bytes"]
        self._others = max(0.0, (gauges.waiting or 0) + (gauges.running or 0) - self.in_flight)
        if page is not None and (info := parse_info(page)) != self.info:
            self.info = info
            log.info("replica says what it runs", extra={"replica": self.url, **asdict(info)})

    async def kv_cache(self) -> dict[str, Any]:
        """Return the sizes of its KV cache as it says them now; see `kv_cache_sizes`."""
        page = b""
        with contextlib.suppress(UpstreamError):  # a comparison is good without it
            _, page = await self.get("/metrics")
        return kv_cache_sizes(page)

    async def get(self, path: str, headers: Headers | None = None) -> tuple[int, bytes]:
        """Return status and body of a GET, within the health check's time.

        Raises:
            UpstreamError: there was no answer.
        """
        timeout = self.config.health.timeout
        connection = await self.pool.send(
            "GET",
            path,
            headers or [],
            b"",
            connect_timeout=timeout,
            read_timeout=timeout,
            total_timeout=timeout,
        )
        try:
            return connection.status, await connection.rest(MAX_PAGE_BYTES)
        finally:
            self.pool.put(connection)

    # Load

    @property
    def kv_used_bytes(self) -> float | None:
        """Bytes of its KV cache in use; None where the server does not say how large that is."""
        if self.kv_bytes is None or self.kv_usage is None:
            return None
        return self.kv_bytes * self.kv_usage

    @property
    def load(self) -> float:
        """Requests here: ours as of now, others' as of the last health check."""
        return self.in_flight + self._others

    @property
    def has_room(self) -> bool:
        """Whether it can take another request without queueing it for long."""
        limits = self.config.limits
        most = limits.max_concurrent_per_replica
        return (
            (most is None or self.in_flight < most)
            and (self.kv_usage is None or self.kv_usage <= limits.max_kv_usage)
            and (self.waiting is None or self.waiting <= limits.max_waiting)
        )

    # Circuit breaker

    @property
    def circuit(self) -> str:
        """closed: in use; open: left alone; half_open: one request may test it."""
        if self._failures < self.config.breaker.failures:
            return "closed"
        return "open" if time.monotonic() < self._open_until else "half_open"

    @property
    def accepts(self) -> bool:
        """Whether the circuit lets a request through."""
        circuit = self.circuit
        return circuit == "closed" or (circuit == "half_open" and not self._tested)

    @property
    def seconds_open(self) -> float:
        """Seconds until the circuit lets a request through."""
        return max(0.0, self._open_until - time.monotonic()) if self.circuit != "closed" else 0.0

    def configure(self, config: Config, api_key: str | None) -> None:
        """Take over another configuration."""
        self.config = config
        self.pool.api_key = api_key
        self.pool.idle_seconds = config.timeouts.idle
        self.draining = False

    def drain(self) -> None:
        """Stop taking requests; those that run end as they would."""
        self.draining = True
        if self.in_flight == 0:
            self._close()

    def _close(self) -> None:
        self.pool.close()
        log.info("replica has drained", extra={"replica": self.url})


class Attempt:
    """One request at one replica, from the choice of the replica until its answer's end."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self._tests = replica.circuit == "half_open"
        replica._tested = replica._tested or self._tests
        replica.in_flight += 1

    def began(self) -> None:
        """Close a circuit that was being tested: an answer has begun."""
        if self._tests:
            self.replica._failures = 0

    def succeeded(self) -> None:
        """Close the circuit: the replica has answered."""
        self.replica._failures = 0
        self.replica._opened = 0

    def failed(self) -> None:
        """Count a failure of the replica, whose circuit may open."""
        replica = self.replica
        breaker = replica.config.breaker
        replica._failures += 1
        if replica._failures >= breaker.failures and replica.circuit == "half_open":
            wait = breaker.open_seconds * min(2**replica._opened, 8)
            replica._opened += 1
            replica._open_until = time.monotonic() + wait
            log.warning("circuit opens for %.3g s", wait, extra={"replica": replica.url})

    def end(self) -> None:
        """Give the replica's place back, whatever the answer was."""
        replica = self.replica
        replica.in_flight -= 1
        if self._tests:
            replica._tested = False
        if replica.draining and replica.in_flight == 0:
            replica._close()
