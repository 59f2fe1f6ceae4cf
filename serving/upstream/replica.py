"""One vLLM server: its connections, its health, its load and its circuit breaker."""

import logging
import re
import time
from collections.abc import Iterable
from dataclasses import asdict

from serving.config import Breaker, Config
from serving.upstream.http import Connection, Pool, StaleError, UpstreamError
from serving.upstream.kv import figures
from serving.upstream.vllm_metrics import NOTHING, ServerInfo, parse_info

log = logging.getLogger("attnserve")

GAUGES = re.compile(
    rb"^vllm:(kv_cache_usage_perc|num_requests_waiting|num_requests_running)(?:\{[^}\n]*\})? (\S+)",
    re.MULTILINE,
)


class Replica:
    """A server, by its address; it outlives a change of configuration that still names it."""

    def __init__(self, url: str, config: Config, api_key: str | None = None) -> None:
        self.url = url
        self.api_key = api_key
        self.pool = Pool(url, config.timeouts.idle)
        self.config = config
        self.in_flight = 0  # requests that this gateway has open here
        self.draining = False
        self.healthy: bool | None = None  # None: not looked at yet
        self.info: ServerInfo = NOTHING  # what it said at the last look that it could answer
        self.kv_usage: float | None = None  # a fraction; None: not known
        self.kv_bytes: int | None = None  # of the whole cache
        self.waiting: float | None = None
        self.running: float | None = None
        self._others = 0.0  # requests of other clients here, when last looked at
        self._missed = 0  # looks without success in a row
        self._failures = 0  # requests that failed in a row
        self._opened = 0  # times that the circuit has opened since it was closed
        self._open_until = 0.0
        self._trying = False

    # Health

    async def look(self) -> None:
        """Ask for /health and /metrics once, and take note."""
        try:
            status, _ = await self.get("/health")
            healthy = status == 200
            if healthy:
                status, page = await self.get("/metrics")
                self._note_gauges(page if status == 200 else b"")
                if status == 200:
                    self._note_info(parse_info(page))
        except UpstreamError:
            healthy = False
        self._missed = 0 if healthy else self._missed + 1
        if healthy or self.healthy is None or self._missed >= self.config.health.failures:
            if healthy != self.healthy:
                log.log(
                    logging.INFO if healthy else logging.WARNING,
                    "replica is %s",
                    "healthy" if healthy else "not healthy",
                    extra={"replica": self.url},
                )
            if healthy and not self.healthy:
                self._open_until = 0.0  # one may try at once
            self.healthy = healthy

    async def is_well(self) -> bool:
        """Whether it answers /health now. A server whose engine has died says 500 to what it was
        doing, as it does to a request that it cannot serve; this tells them apart."""
        try:
            status, _ = await self.get("/health")
        except UpstreamError:
            return False
        return status == 200

    def _note_gauges(self, page: bytes) -> None:
        """vLLM's own gauges, added up over its engines (of the KV caches the fullest)."""
        found: dict[bytes, list[float]] = {}
        for name, value in GAUGES.findall(page):
            found.setdefault(name, []).append(float(value))
        usages = found.get(b"kv_cache_usage_perc")
        waiting = found.get(b"num_requests_waiting")
        running = found.get(b"num_requests_running")
        self.kv_usage = max(usages) if usages else None
        self.kv_bytes = figures(page)["cache_bytes"]
        self.waiting = sum(waiting) if waiting else None
        self.running = sum(running) if running else None
        self._others = max(0.0, (self.waiting or 0) + (self.running or 0) - self.in_flight)

    def _note_info(self, info: ServerInfo) -> None:
        """What it runs: logged when that is new."""
        if info != self.info:
            self.info = info
            log.info("replica says what it runs", extra={"replica": self.url, **asdict(info)})

    async def get(
        self, path: str, headers: Iterable[tuple[bytes, bytes]] = ()
    ) -> tuple[int, bytes]:
        """Status and body of a GET, within the health check's time.

        Raises:
            UpstreamError: there was no answer.
        """
        longest = self.config.health.timeout
        for fresh in (False, True):
            connection = await self.pool.get(longest, fresh)
            try:
                await connection.request(self.head("GET", path, headers), longest, longest)
                return connection.status, await connection.rest()
            except StaleError:
                pass
            finally:
                self.pool.put(connection)
        raise AssertionError("a fresh connection is never stale")

    def head(self, method: str, target: str, headers: Iterable[tuple[bytes, bytes]]) -> bytes:
        """The head of a request, with the server's own key if it has one."""
        start = f"{method} {target} HTTP/1.1\r\nhost: ".encode("ascii")
        lines = [b"%b%b\r\n" % (start, self.pool.netloc)]
        if self.api_key is not None:
            lines.append(b"authorization: Bearer %b\r\n" % self.api_key.encode("latin-1"))
        for name, value in headers:
            lines.append(b"%b: %b\r\n" % (name, value))
        lines.append(b"\r\n")
        return b"".join(lines)

    # Load

    @property
    def kv_used_bytes(self) -> float | None:
        """Bytes of its KV cache in use; None where the server does not say how large that is."""
        if self.kv_bytes is None or self.kv_usage is None:
            return None
        return self.kv_bytes * self.kv_usage

    @property
    def load(self) -> float:
        """Requests here: ours as of now, others' as of the last look."""
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
        """closed: in use; open: left alone; half_open: one request may try it."""
        if self._failures < self.breaker.failures:
            return "closed"
        return "open" if time.monotonic() < self._open_until else "half_open"

    @property
    def breaker(self) -> Breaker:
        """Its settings."""
        return self.config.breaker

    @property
    def accepts(self) -> bool:
        """Whether the circuit lets a request through."""
        circuit = self.circuit
        return circuit == "closed" or (circuit == "half_open" and not self._trying)

    @property
    def closed_for(self) -> float:
        """Seconds until the circuit lets a request through."""
        return max(0.0, self._open_until - time.monotonic()) if self.circuit != "closed" else 0.0

    def begin(self) -> "Turn":
        """Count a request that is sent here now; the turn's `end` must follow."""
        return Turn(self)

    def configure(self, config: Config, api_key: str | None) -> None:
        """Take over another configuration."""
        self.config = config
        self.api_key = api_key
        self.pool.idle_seconds = config.timeouts.idle
        self.draining = False

    def drain(self) -> None:
        """It gets no further request; those that run end as they would."""
        self.draining = True
        if self.in_flight == 0:
            self._drained()

    def _drained(self) -> None:
        self.pool.close()
        log.info("replica has drained", extra={"replica": self.url})


class Turn:
    """One request at one replica, from being chosen until its answer's end."""

    def __init__(self, replica: Replica) -> None:
        self.replica = replica
        self._trial = replica.circuit == "half_open"
        replica._trying = replica._trying or self._trial
        replica.in_flight += 1
        self._ended = False

    def succeeded(self) -> None:
        """The replica has answered: its circuit closes."""
        self.replica._failures = 0
        self.replica._opened = 0

    def failed(self) -> None:
        """The replica has failed the request: its circuit may open."""
        replica = self.replica
        replica._failures += 1
        if replica._failures >= replica.breaker.failures and replica.circuit == "half_open":
            wait = replica.breaker.open_seconds * min(2**replica._opened, 8)
            replica._opened += 1
            replica._open_until = time.monotonic() + wait
            log.warning("circuit opens for %.3g s", wait, extra={"replica": replica.url})

    def end(self) -> None:
        """The request is over, however; safe to call again."""
        if self._ended:
            return
        self._ended = True
        replica = self.replica
        replica.in_flight -= 1
        if self._trial:
            replica._trying = False
        if replica.draining and replica.in_flight == 0:
            replica._drained()


async def send_request(replica: Replica, head: bytes, body: bytes, total: float) -> Connection:
    """Send a request and return the connection once the answer's head and first bytes are here.

    A kept connection that the server was just closing costs nothing but a second, fresh one.

    Raises:
        UpstreamError: the replica failed it; nothing of an answer had come.
    """
    timeouts = replica.config.timeouts
    for fresh in (False, True):
        connection = await replica.pool.get(timeouts.connect, fresh)
        try:
            await connection.request(head + body, timeouts.silence, total)
            return connection
        except StaleError:
            connection.close()
            log.debug(
                "a kept connection was closed; trying a fresh one", extra={"replica": replica.url}
            )
        except BaseException:
            connection.close()
            raise
    raise AssertionError("a fresh connection is never stale")
