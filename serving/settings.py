"""What the gateway can be told, all of it through environment variables."""

from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field, ValidationError
from pydantic_settings import BaseSettings, SettingsConfigDict


def _plain_http_url(value: str) -> str:
    """An http(s) address without query or fragment, and without a slash at the end."""
    parts = urlsplit(value)
    is_http = parts.scheme in ("http", "https") and parts.hostname
    if not is_http or parts.query or parts.fragment or parts.port == 0:  # port may raise, too
        raise ValueError("must be an address like http://127.0.0.1:8000")
    return value.rstrip("/")


class Settings(BaseSettings):
    """The gateway's settings; the names in capitals are the environment variables."""

    model_config = SettingsConfigDict(
        frozen=True, populate_by_name=True, use_attribute_docstrings=True
    )

    host: str = Field("127.0.0.1", alias="GATEWAY_HOST", min_length=1)
    """The address to listen on."""

    port: int = Field(8080, alias="GATEWAY_PORT", ge=1, le=65535)
    """The port to listen on."""

    upstream_url: Annotated[str, AfterValidator(_plain_http_url)] = Field(
        "http://127.0.0.1:8000", alias="UPSTREAM_URL"
    )
    """The vLLM server, without /v1."""

    connect_seconds: float = Field(5.0, alias="UPSTREAM_CONNECT_SECONDS", gt=0)
    """Longest wait for a connection to the upstream."""

    silence_seconds: float = Field(600.0, alias="UPSTREAM_SILENCE_SECONDS", gt=0)
    """Longest wait for the next byte of an answer; a long answer that is not streamed is silent."""

    health_seconds: float = Field(2.0, alias="UPSTREAM_HEALTH_SECONDS", gt=0)
    """Longest wait for the upstream's own /health."""

    max_body_bytes: int = Field(16 * 1024 * 1024, alias="GATEWAY_MAX_BODY_BYTES", gt=0)
    """Largest request body accepted; larger ones get 413."""

    drain_seconds: int = Field(10, alias="GATEWAY_DRAIN_SECONDS", ge=0)
    """How long running requests may go on after SIGTERM."""


def describe(error: ValidationError) -> str:
    """A validation error in one line: each variable, what is wrong with it, what it was."""
    return "; ".join(
        f"{'.'.join(map(str, e['loc']))}={e['input']!r}: {e['msg'].removeprefix('Value error, ')}"
        for e in error.errors()
    )
