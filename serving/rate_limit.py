"""What one key may use: requests and tokens per time, and requests at a time."""

import math
import time

from serving.config import KeyEntry
from serving.openai.errors import ApiError

MINUTE, DAY = 60.0, 86400.0


class Bucket:
    """A token bucket: `limit` in a time of `seconds`, refilled all the time; None is no limit."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        self.limit: int | None = None
        self.level = 0.0
        self._filled_at = 0.0

    def set(self, limit: int | None, now: float) -> None:
        """Set another limit; what has been used stays used."""
        used = self.used(now)
        self.limit = limit
        self.level = (limit or 0) - used
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


class Account:
    """What one key has used. A request reserves the most it can take, and settles when it is over;
    a key cannot get further than its limit by asking for much at once."""

    def __init__(self) -> None:
        self.name = ""
        self.max_concurrent: int | None = None
        self.in_flight = 0
        self.requests = Bucket(MINUTE)
        self.tokens = Bucket(MINUTE)
        self.days_tokens = Bucket(DAY)

    @property
    def limits_tokens(self) -> bool:
        """Whether there is any limit of tokens."""
        return self.tokens.limit is not None or self.days_tokens.limit is not None

    def set(self, entry: KeyEntry) -> None:
        """Take over the limits of a configuration."""
        now = time.monotonic()
        self.name = entry.name
        self.max_concurrent = entry.max_concurrent
        self.requests.set(entry.requests_per_minute, now)
        self.tokens.set(entry.tokens_per_minute, now)
        self.days_tokens.set(entry.tokens_per_day, now)

    def reserve(self, tokens: int) -> None:
        """Begin a request that takes at most so many tokens; `settle` ends it.

        Raises:
            ApiError: 429, with the time after which it may go, and nothing is reserved.
        """
        now = time.monotonic()
        if self.max_concurrent is not None and self.in_flight >= self.max_concurrent:
            message = f"{self.max_concurrent} requests are running, which is this key's limit."
            raise rate_limited(message, "requests", 1.0)
        for what, unit, bucket, amount in (
            ("requests", "requests per min (RPM)", self.requests, 1),
            ("tokens", "tokens per min (TPM)", self.tokens, tokens),
            ("tokens", "tokens per day (TPD)", self.days_tokens, tokens),
        ):
            wait = bucket.wait(amount, now)
            if wait == math.inf:
                message = (
                    f"Request too large on {unit}: Limit {bucket.limit}, Requested {amount}. "
                    "The input or output tokens must be reduced in order to run successfully."
                )
                raise rate_limited(message, what, None)
            if wait > 0:
                message = (
                    f"Rate limit reached on {unit}: Limit {bucket.limit}, "
                    f"Used {bucket.used(now):.0f}, Requested {amount}. "
                    f"Please try again in {wait:.3g}s."
                )
                raise rate_limited(message, what, wait)
        self.in_flight += 1
        self.requests.level -= 1
        self.tokens.level -= tokens
        self.days_tokens.level -= tokens

    def settle(self, reserved: int, used: int) -> None:
        """End a request: what it reserved and did not use is there again."""
        self.in_flight -= 1
        self.tokens.level += reserved - used
        self.days_tokens.level += reserved - used

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return OpenAI's x-ratelimit headers, of the limits that there are."""
        now = time.monotonic()
        found = []
        for what, bucket in (("requests", self.requests), ("tokens", self.tokens)):
            if bucket.limit is not None:
                used = max(0.0, bucket.used(now))
                for name, value in (
                    ("limit", str(bucket.limit)),
                    ("remaining", str(max(0, math.floor(bucket.limit - used)))),
                    ("reset", f"{used * bucket.seconds / bucket.limit:.3f}s"),
                ):
                    found.append((f"x-ratelimit-{name}-{what}".encode(), value.encode()))
        return found


def rate_limited(message: str, kind: str, wait: float | None) -> ApiError:
    """Return OpenAI's 429; without `wait`, it is no use to try again."""
    return ApiError(429, message, kind, "rate_limit_exceeded", retry_after=wait)
