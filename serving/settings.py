"""The simple case: one vLLM server, everything set through environment variables."""

from pydantic import Field
from pydantic_settings import BaseSettings, SettingsConfigDict

from serving.config import EVERY, Config, Health, Limits, ModelEntry, Timeouts, Url


class Settings(BaseSettings):
    """The gateway's settings; the names in capitals are the environment variables."""

    model_config = SettingsConfigDict(
        frozen=True, populate_by_name=True, use_attribute_docstrings=True
    )

    host: str = Field("127.0.0.1", alias="GATEWAY_HOST", min_length=1)
    """The address to listen on."""

    port: int = Field(8080, alias="GATEWAY_PORT", ge=1, le=65535)
    """The port to listen on."""

    upstream_url: Url = Field("http://127.0.0.1:8000", alias="UPSTREAM_URL")
    """The vLLM server; a /v1 at the end is taken off."""

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

    def config(self) -> Config:
        """The same as a configuration: one server, for every model."""
        return Config(
            host=self.host,
            port=self.port,
            models=(ModelEntry(name=EVERY, replicas=(self.upstream_url,)),),
            limits=Limits(max_body_bytes=self.max_body_bytes),
            timeouts=Timeouts(
                connect=self.connect_seconds,
                silence=self.silence_seconds,
                drain=self.drain_seconds,
            ),
            health=Health(timeout=self.health_seconds),
        )
