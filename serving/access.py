"""Which requests are let in, whatever they ask for: by their host, and by headers that may stand
once. Which web pages may read the answers (CORS)."""

from functools import lru_cache

from starlette.datastructures import Headers as StarletteHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import Scope

from serving.addresses import ip_of, is_loopback
from serving.config import Config
from serving.openai.errors import ApiError
from serving.upstream.http import Headers

ONCE = frozenset((b"authorization", b"content-length", b"content-type", b"host", b"origin"))
"""Of several, one reader takes the first, another the last: what is checked is not what is used."""

EXPOSED = (
    "x-request-id, retry-after, retry-after-ms, x-should-retry, "
    "x-ratelimit-limit-requests, x-ratelimit-remaining-requests, x-ratelimit-reset-requests, "
    "x-ratelimit-limit-tokens, x-ratelimit-remaining-tokens, x-ratelimit-reset-tokens"
)
"""Headers of answers that a web page of an allowed origin may read."""


class Access:
    """What a configuration says of it. (starlette's middleware would wrap each proxied stream.)"""

    def __init__(self, config: Config, bound: str) -> None:
        """Take a configuration over; `bound` is the address that is really listened on."""
        hosts = [host.lower() for host in config.allowed_hosts]
        self._loopback = is_loopback(bound)
        self._any_host = "*" in hosts or not (hosts or self._loopback)
        self._hosts = frozenset(hosts)
        self._domains = tuple(host[1:] for host in hosts if host.startswith("*."))
        self._is_own = lru_cache(16)(self._is_own_host)  # most requests have the same
        self._cors = None
        if config.cors_origins:
            self._cors = CORSMiddleware(
                no_application,
                allow_origins=config.cors_origins,
                allow_methods=("GET", "POST"),
                allow_headers=("*",),
            )

    def check(self, headers: Headers, by_name: dict[bytes, bytes]) -> None:
        """Let a request with these headers in, which `by_name` has once each.

        Raises:
            ApiError: 400; one that may stand once stands twice, or the host is none of ours.
        """
        if len(by_name) < len(headers):
            names = [name for name, _ in headers]
            for name in ONCE:
                if names.count(name) > 1:
                    message = f"The header {name.decode()} stands twice in the request."
                    raise ApiError(400, message, code="duplicate_header")
        if not (self._any_host or self._is_own(by_name.get(b"host"))):
            message = "This gateway has another name; its setting `allowed_hosts` has those it may."
            raise ApiError(400, message, code="invalid_host")

    def _is_own_host(self, header: bytes | None) -> bool:
        """Return whether no web page can have been led here by this name (DNS rebinding)."""
        if header is None:
            return True
        host = host_name(header)
        own = is_loopback(host) if self._loopback else ip_of(host) is not None
        return own or host in self._hosts or host.endswith(self._domains)

    def preflight(self, scope: Scope) -> Response | None:
        """Return the answer to a browser that asks what a page may do; None if it does not ask."""
        headers = StarletteHeaders(scope=scope)
        asks = "origin" in headers and "access-control-request-method" in headers
        return self._cors.preflight_response(headers) if self._cors and asks else None

    def cors_headers(self, origin: bytes | None) -> Headers:
        """Return what the answer to a request of this origin says to a browser."""
        if self._cors is None:
            return []
        found = [(b"vary", b"Origin")]
        if origin is not None and self._cors.is_allowed_origin(origin.decode("latin-1")):
            found.append((b"access-control-allow-origin", origin))
            found.append((b"access-control-expose-headers", EXPOSED.encode()))
        return found


async def no_application(*_: object) -> None:
    """Stand for the application that a middleware has: of ours, only the answers are used."""


def host_name(value: bytes) -> str:
    """Return a Host header's name in lower case, without its port."""
    name = value.decode("latin-1").lower()
    head, colon, port = name.rpartition(":")
    return head if colon and "]" not in port else name
