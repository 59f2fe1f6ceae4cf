"""What one key may use: requests, tokens and cost per time, and requests at a time."""

import asyncio
import math
import time
from typing import Any, NamedTuple

from serving.config import KeyEntry
from serving.openai.errors import ApiError

MINUTE, DAY = 60.0, 86400.0


class Limit(NamedTuple):
    """A limit that a key may have."""

    field: str
    """Of the configuration."""
    seconds: float
    kind: str
    """The `type` of the error where it is reached."""
    unit: str
    """What the error's message calls it."""


LIMITS = (
    Limit("requests_per_minute", MINUTE, "requests", "requests per min (RPM)"),
    Limit("tokens_per_minute", MINUTE, "tokens", "tokens per min (TPM)"),
    Limit("tokens_per_day", DAY, "tokens", "tokens per day (TPD)"),
    Limit("cost_per_day", DAY, "insufficient_quota", "cost per day"),
)


class Bucket:
    """A token bucket: `limit` in a time of `seconds`, refilled all the time; None is no limit."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.limit: float | None = None
        self.level = 0.0
        self._filled_at = 0.0

    def set(self, limit: float | None, now: float) -> None:
        """Set another limit; what has been used stays used."""
        used = self.used(now)
        self.limit = limit
        self.set_used(used, now)

    def set_used(self, used: float, now: float) -> None:
        """Take over what somebody else says is used."""
        self.level = (self.limit or 0) - used
        self._filled_at = now

    def used(self, now: float) -> float:
        """Return how much is used at the moment."""
        if self.limit is None:
            return 0.0
        self.level += (now - self._filled_at) * self.limit / self.seconds
        self.level = min(self.level, self.limit)
        self._filled_at = now
        return self.limit - self.level

    def wait(self, amount: float, now: float) -> float:
        """Return the seconds until `amount` is there; 0 if it is, inf if it never will be."""
        if self.limit is None:
            return 0.0
        if amount > self.limit:
            return math.inf
        missing = amount + self.used(now) - self.limit
        return max(0.0, missing * self.seconds / self.limit)


class Reservation(NamedTuple):
    """What a request may use at most, of each limit."""

    amounts: tuple[float, ...]
    request: str | None = None
    """Its name where gateways share limits."""


class Account:
    """What one key has used. A request reserves the most it can take, and settles when it is over;
    a key cannot get further than its limit by asking for much at once."""

    def __init__(self, key: str = "") -> None:
        """Begin with nothing used; `key` is the key's hash."""
        self.key = key
        self.name = ""
        self.max_concurrent: int | None = None
        self.in_flight = 0
        self.buckets = [Bucket(limit.seconds) for limit in LIMITS]
        self.running: set[asyncio.Task[Any] | None] = set()
        """The tasks of the key's requests, which end when it is revoked."""
        self.revoked = False

    def revoke(self) -> None:
        """End what runs, and have nothing begin any more."""
        self.revoked = True
        for task in self.running:
            if task is not None:
                task.cancel()

    @property
    def limits_answers(self) -> bool:
        """Whether there is a limit of what depends on an answer's length: of all but requests."""
        return any(bucket.limit is not None for bucket in self.buckets[1:])

    def set(self, entry: KeyEntry) -> None:
        """Take over the limits of a configuration."""
        now = time.monotonic()
        self.name = entry.name
        self.max_concurrent = entry.max_concurrent
        for limit, bucket in zip(LIMITS, self.buckets, strict=True):
            bucket.set(getattr(entry, limit.field), now)

    async def reserve(self, tokens: int, cost: float) -> Reservation:
        """Begin a request that takes at most so many tokens and costs at most so much; `settle`
        ends it.

        Raises:
            ApiError: 429, with the time after which it may go, and nothing is reserved.
        """
        amounts = (1, tokens, tokens, cost)
        now = time.monotonic()
        if self.max_concurrent is not None and self.in_flight >= self.max_concurrent:
            raise self.refusal(len(LIMITS), amounts, now)
        for i, bucket in enumerate(self.buckets):
            if bucket.wait(amounts[i], now):
                raise self.refusal(i, amounts, now)
        for bucket, amount in zip(self.buckets, amounts, strict=True):
            bucket.level -= amount
        self.in_flight += 1
        return Reservation(amounts)

    def settle(self, reservation: Reservation, tokens: int, cost: float) -> None:
        """End a request: what it reserved and did not use is there again."""
        self.in_flight -= 1
        used = (1, tokens, tokens, cost)
        for bucket, amount, really in zip(self.buckets, reservation.amounts, used, strict=True):
            bucket.level += amount - really

    def refusal(self, index: int, amounts: tuple[float, ...], now: float) -> ApiError:
        """Return the error where the limit at this place of `LIMITS` does not allow so much; behind
        them is the number of requests at a time."""
        if index == len(LIMITS):
            message = f"{self.max_concurrent} requests are running, which is this key's limit."
            return rate_limited(message, "requests", 1.0)
        limit, bucket, amount = LIMITS[index], self.buckets[index], amounts[index]
        what, wait = limit.kind, bucket.wait(amount, now)
        if wait == math.inf:
            message = (
                f"Request too large on {limit.unit}: Limit {bucket.limit}, Requested {amount}. "
                "The input or output tokens must be reduced in order to run successfully."
            )
            return rate_limited(message, what, None)
        digits = 0 if isinstance(amount, int) else 6
        message = (
            f"Rate limit reached on {limit.unit}: Limit {bucket.limit}, "
            f"Used {bucket.used(now):.{digits}f}, Requested {amount:.{digits}f}. "
            f"Please try again in {wait:.3g}s."
        )
        return rate_limited(message, what, wait)

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return OpenAI's x-ratelimit headers, of the limits that there are: of tokens the one for
        a minute, else the one for a day."""
        now = time.monotonic()
        found = []
        requests, tokens, days_tokens, _ = self.buckets
        tokens = days_tokens if tokens.limit is None else tokens
        for what, bucket in (("requests", requests), ("tokens", tokens)):
            if bucket.limit is not None:
                used = max(0.0, bucket.used(now))
                for name, value in (
                    ("limit", str(bucket.limit)),
                    ("remaining", str(max(0, math.floor(bucket.limit - used)))),
                    ("reset", duration(used * bucket.seconds / bucket.limit)),
                ):
                    found.append((f"x-ratelimit-{name}-{what}".encode(), value.encode()))
        return found


def duration(seconds: float) -> str:
    """Return a time as OpenAI's headers have it, which is how Go writes one: 17ms, 8.64s, 6m0s."""
    milliseconds = math.ceil(seconds * 1000)
    if 0 < milliseconds < 1000:
        return f"{milliseconds}ms"
    minutes, milliseconds = divmod(milliseconds, 60_000)
    hours, minutes = divmod(minutes, 60)
    text = f"{milliseconds / 1000:g}s"
    return f"{hours}h{minutes}m{text}" if hours else f"{minutes}m{text}" if minutes else text


def rate_limited(message: str, kind: str, wait: float | None) -> ApiError:
    """Return OpenAI's 429; without `wait`, it is no use to try again."""
    code = kind if kind == "insufficient_quota" else "rate_limit_exceeded"
    return ApiError(429, message, kind, code, retry_after=wait)
