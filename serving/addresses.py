"""Addresses in a configuration: of servers, of web pages and of Redis."""

import re
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, SecretStr


def server_url(value: str) -> str:
    """Return the http(s) address of a server without `/v1`, with which OpenAI's base URLs end.

    Raises:
        ValueError: it is none, or has a user, a query, a fragment or another path.
    """
    try:
        parts = urlsplit(value)
        is_http = re.fullmatch(r"(?ia)https?://[\w.:\[\]-]+(/[!-~]*)?", value)
        labels = (parts.hostname or "").encode("idna")  # an error if one is empty or too long
        good = is_http and labels and parts.port != 0 and not parts.query and not parts.fragment
    except ValueError:  # its text has parts of the address, which may be secret
        good = None
    if not good:
        raise ValueError("must be an address like http://127.0.0.1:8000")
    if parts.path.rstrip("/") not in ("", "/v1"):
        raise ValueError("must end after the port or after /v1, not with another path")
    return f"{parts.scheme}://{parts.netloc}"


def origin(value: str) -> str:
    """Return the origin of web pages, as browsers write it; "*" is every one.

    Raises:
        ValueError: it is none.
    """
    if value != "*" and not re.fullmatch(r"[a-z][a-z0-9+.-]*://[a-z0-9.:\[\]-]+", value):
        raise ValueError("must be an origin like https://chat.example.com, without a path")
    return value


def host_name(value: str) -> str:
    """Return a name that clients may call the gateway by; "*" is any, "*.corp" all below it.

    Raises:
        ValueError: it is none, so that no request would have it.
    """
    if not re.fullmatch(r"(?a)\*|(\*\.)?[\w-]+(\.[\w-]+)*|\[[0-9a-fA-F:.]+\]", value):
        raise ValueError('must be a name without a port, like gw.example.com, "*.corp" or "*"')
    return value


def redis_url(value: SecretStr) -> SecretStr:
    """Return the address of a Redis.

    Raises:
        ValueError: it is none.
    """
    try:
        parts = urlsplit(value.get_secret_value())
        good = parts.port != 0 and bool(parts.hostname or parts.path)
    except ValueError:
        good = False
    if not good or parts.scheme not in ("redis", "rediss", "unix"):
        raise ValueError("must be an address like redis://127.0.0.1:6379")
    return value


def is_loopback(host: str) -> bool:
    """Return whether a name or address is that of this machine to itself."""
    address = ip_of(host)
    own_name = host == "localhost" or host.endswith(".localhost")
    return own_name if address is None else address.is_loopback


def ip_of(host: str) -> IPv4Address | IPv6Address | None:
    """Return the address that a host is written as; None: it is a name."""
    try:
        return ip_address(host.strip("[]"))
    except ValueError:
        return None


Url = Annotated[str, AfterValidator(server_url)]
HostName = Annotated[str, AfterValidator(host_name)]
Origin = Annotated[str, AfterValidator(origin)]
RedisUrl = Annotated[SecretStr, AfterValidator(redis_url)]
