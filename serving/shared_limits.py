"""Limits of keys that several gateways share: what has been used stands in Redis or Valkey.

A request reserves in one script, so no two gateways give away the same tokens. Its reservation has
a lease, which its gateway renews while it runs: what a gateway that was killed had reserved is free
again after `LEASE_SECONDS`.
"""

import asyncio
import logging
import time
import uuid
from collections import defaultdict
from typing import Any

from attnserve.errors import UserError
from serving.openai.errors import ApiError
from serving.rate_limit import LIMITS, Account, Reservation

log = logging.getLogger("attnserve")

LEASE_SECONDS = 10.0
TIMEOUT_SECONDS = 1.0
"""Longest wait for Redis, and how long it is left alone after it has failed."""

REMEMBERED_SECONDS = 600
"""How long Redis knows that a request has been settled, and how long a gateway whose attempt may
have been lost goes on trying."""

KEPT = ("used", "running", "held", "settled")
"""What Redis has of each client's key."""

# KEYS of each script: a hash of what is used of each limit, and when (`at`) that was; the running
# requests by the end of their lease; a hash of what each of them holds; the requests that have been
# settled by the time until which that is remembered.

# ARGV: the request, the lease, how many may run (-1: any), and of each limit: how much (-1: any),
# in how many seconds, and the amount to reserve. Returns the place of the limit that refuses it (0:
# none does) and what is used of each. Buckets leak as those of `serving.rate_limit` do.
RESERVE = """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1e6
local count = (#ARGV - 3) / 3
local free = {}
for _, id in ipairs(redis.call('ZRANGEBYSCORE', KEYS[2], '-inf', now)) do
  local i = 0
  for amount in string.gmatch(redis.call('HGET', KEYS[3], id) or '', '%S+') do
    i = i + 1
    free[i] = (free[i] or 0) + amount
  end
  redis.call('ZREM', KEYS[2], id)
  redis.call('HDEL', KEYS[3], id)
end
local most = tonumber(ARGV[3])
local refused = most >= 0 and redis.call('ZCARD', KEYS[2]) >= most and count + 1 or 0
local at = tonumber(redis.call('HGET', KEYS[1], 'at') or now)
local used, amounts = {}, {}
for i = 1, count do
  local limit, seconds = tonumber(ARGV[3 * i + 1]), tonumber(ARGV[3 * i + 2])
  amounts[i] = ARGV[3 * i + 3]
  used[i] = 0
  if limit >= 0 then
    local before = tonumber(redis.call('HGET', KEYS[1], i) or 0) - (free[i] or 0)
    used[i] = math.max(0, before - math.max(0, now - at) * limit / seconds)
    if refused == 0 and used[i] + amounts[i] > limit then refused = i end
  end
end
for i = 1, count do
  if refused == 0 then used[i] = used[i] + amounts[i] end
  used[i] = string.format('%.17g', used[i])
  redis.call('HSET', KEYS[1], i, used[i])
end
redis.call('HSET', KEYS[1], 'at', string.format('%.17g', now))
if refused == 0 then
  redis.call('ZADD', KEYS[2], now + ARGV[2], ARGV[1])
  redis.call('HSET', KEYS[3], ARGV[1], table.concat(amounts, ' '))
end
for _, key in ipairs(KEYS) do redis.call('EXPIRE', key, 172800) end
return {refused, unpack(used)}
"""

# ARGV: the request, how long to remember that it is settled, and what it has used of each limit.
# One whose lease has ended holds nothing. A second call, if the answer to the first was lost,
# changes nothing.
SETTLE = """
local time = redis.call('TIME')
redis.call('ZREMRANGEBYSCORE', KEYS[4], '-inf', time[1])
if redis.call('ZADD', KEYS[4], 'NX', time[1] + ARGV[2], ARGV[1]) == 0 then return end
local i = 2
local held = {}
for amount in string.gmatch(redis.call('HGET', KEYS[3], ARGV[1]) or '', '%S+') do
  i = i + 1
  held[i] = amount
end
for i = 3, #ARGV do
  redis.call('HINCRBYFLOAT', KEYS[1], i - 2, ARGV[i] - (held[i] or 0))
end
redis.call('ZREM', KEYS[2], ARGV[1])
redis.call('HDEL', KEYS[3], ARGV[1])
redis.call('EXPIRE', KEYS[1], 172800)
redis.call('EXPIRE', KEYS[4], ARGV[2])
"""

# ARGV: the lease, and the requests that go on.
RENEW = """
local time = redis.call('TIME')
for i = 2, #ARGV do
  redis.call('ZADD', KEYS[2], 'XX', time[1] + time[2] / 1e6 + ARGV[1], ARGV[i])
end
"""


class SharedLimits:
    """The connection to Redis, and the reservations of this gateway."""

    def __init__(self, url: str) -> None:
        """Take an address; nothing is connected yet.

        Raises:
            UserError: redis-py is not installed, or does not take the address.
        """
        try:
            from redis import RedisError
            from redis.asyncio import BlockingConnectionPool, Redis
            from redis.asyncio.retry import Retry
            from redis.backoff import NoBackoff
        except ImportError:
            raise UserError("the setting redis needs: pip install 'attnserve[redis]'") from None
        try:
            pool = BlockingConnectionPool.from_url(
                url,
                max_connections=32,
                timeout=TIMEOUT_SECONDS,
                socket_timeout=TIMEOUT_SECONDS,
                socket_connect_timeout=TIMEOUT_SECONDS,
                retry=Retry(NoBackoff(), 0),  # a script may have run
            )
        except ValueError:  # its text may have the password
            raise UserError("the setting redis is no address that redis-py takes") from None
        self.errors = (RedisError, OSError, RuntimeError)  # uvloop's, of a connection just closed
        self.refuse = True
        """Whether requests are refused while Redis is gone; else the gateway's own limits hold."""
        self._redis = Redis.from_pool(pool)
        self.reserve, self.settle, self.renew = (
            self._redis.register_script(text) for text in (RESERVE, SETTLE, RENEW)
        )
        self.running: dict[str, str] = {}
        """The key's hash of each reservation."""
        self._gone_until = 0.0
        self._settling: set[asyncio.Task[None]] = set()

    def start(self) -> None:
        """Renew leases from now on."""
        self._renewer = asyncio.create_task(self._renew_leases())

    async def close(self) -> None:
        """Settle what is over, if Redis is there, and close the connections."""
        self._renewer.cancel()
        if self._settling:
            await asyncio.wait(self._settling, timeout=2 * TIMEOUT_SECONDS)
        for task in self._settling:
            task.cancel()
        await self._redis.aclose()

    async def call(self, script: Any, key: str, *arguments: Any) -> Any:
        """Run a script on what is kept of a client's key.

        Raises:
            RedisError, OSError, RuntimeError: Redis is gone, or was a moment ago.
        """
        if time.monotonic() < self._gone_until:
            raise ConnectionError
        try:
            names = [f"attnserve:{{{key}}}:{what}" for what in KEPT]
            answer = await script(names, arguments)
        except self.errors as error:
            if not self._gone_until:
                what = "refused" if self.refuse else "held to this gateway's own limits"
                log.error("Redis is gone, requests are %s: %s", what, type(error).__name__)
            self._gone_until = time.monotonic() + TIMEOUT_SECONDS
            raise
        if self._gone_until:
            self._gone_until = 0.0
            log.warning("Redis is back")
        return answer

    def settle_later(self, key: str, request: str, used: tuple[float, ...]) -> None:
        """Settle a request that is over, as soon as Redis takes it."""
        self.running.pop(request, None)
        task = asyncio.create_task(self._settle(key, request, used))
        self._settling.add(task)
        task.add_done_callback(self._settling.discard)

    async def _settle(self, key: str, request: str, used: tuple[float, ...]) -> None:
        began = time.monotonic()
        while time.monotonic() < began + REMEMBERED_SECONDS - 2 * TIMEOUT_SECONDS:
            try:
                await self.call(self.settle, key, request, REMEMBERED_SECONDS, *used)
                return
            except self.errors:
                await asyncio.sleep(TIMEOUT_SECONDS)
        log.error("Redis was gone for too long, a request is not counted: %s", request)

    async def _renew_leases(self) -> None:
        while True:
            await asyncio.sleep(LEASE_SECONDS / 3)
            requests = defaultdict(list)
            for request, key in self.running.items():
                requests[key].append(request)
            for key, ids in requests.items():
                try:
                    await self.call(self.renew, key, LEASE_SECONDS, *ids)
                except self.errors:
                    break


class SharedAccount(Account):
    """What one key has used at all gateways. Its buckets are those of Redis, as last seen, and what
    counts while Redis is gone."""

    def __init__(self, shared: SharedLimits, key: str) -> None:
        super().__init__(key)
        self.shared = shared

    async def reserve(self, tokens: int, cost: float) -> Reservation:
        """Begin a request, as `Account` does, in Redis.

        Raises:
            ApiError: 429; or 503, Redis is gone.
        """
        limits = [-1 if bucket.limit is None else bucket.limit for bucket in self.buckets]
        most = -1 if self.max_concurrent is None else self.max_concurrent
        if max(*limits, most) < 0:
            return await super().reserve(tokens, cost)
        request = uuid.uuid4().hex
        amounts = (1, tokens, tokens, cost)
        arguments = [request, LEASE_SECONDS, most]
        for kind, limit, amount in zip(LIMITS, limits, amounts, strict=True):
            arguments += [limit, kind.seconds, amount]
        shared = self.shared
        try:
            refused, *used = await shared.call(shared.reserve, self.key, *arguments)
        except shared.errors:
            if shared.refuse:
                message = "The limits of the API key cannot be looked up."
                code = "limits_unavailable"
                raise ApiError(503, message, code=code, retry_after=TIMEOUT_SECONDS) from None
            return await super().reserve(tokens, cost)
        now = time.monotonic()
        for bucket, amount in zip(self.buckets, used, strict=True):
            bucket.set_used(float(amount), now)
        if refused:
            raise self.refusal(refused - 1, amounts, now)
        self.in_flight += 1
        shared.running[request] = self.key
        return Reservation(amounts, request)

    def settle(self, reservation: Reservation, tokens: int, cost: float) -> None:
        """End a request, in Redis too if it began there."""
        super().settle(reservation, tokens, cost)
        if reservation.request is not None:
            used = (1, tokens, tokens, cost)
            self.shared.settle_later(self.key, reservation.request, used)
