"""OpenTelemetry spans, where it is installed and the environment says where they go.

    pip install opentelemetry-sdk opentelemetry-exporter-otlp-proto-http
    OTEL_EXPORTER_OTLP_ENDPOINT=http://127.0.0.1:4318 attnserve-gateway ...

Without both, a client's `traceparent` is passed on as it is and nothing else happens.
"""

import logging
import os
from collections.abc import Mapping
from typing import Any

log = logging.getLogger("attnserve")

WHERE_TO = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")


class Tracer:
    """Spans of requests, exported in the background by OpenTelemetry's own SDK."""

    def __init__(self) -> None:
        """Set the exporter up; raises ImportError where it is not installed."""
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        name = os.environ.get("OTEL_SERVICE_NAME", "attnserve-gateway")
        self._provider = TracerProvider(resource=Resource.create({"service.name": name}))
        self._provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
        self._tracer = self._provider.get_tracer("attnserve")
        self._kind = SpanKind.SERVER
        self._propagator = TraceContextTextMapPropagator()

    def start(self, name: str, headers: list[tuple[bytes, bytes]]) -> Any:
        """Return a span for a request, below its client's if `headers` name one."""
        carrier = {k.decode("latin-1"): v.decode("latin-1") for k, v in headers}
        context = self._propagator.extract(carrier)
        return self._tracer.start_span(name, context, kind=self._kind)

    def headers(self, span: Any) -> dict[bytes, bytes]:
        """Return the headers that tell the model server of the span."""
        from opentelemetry.trace import set_span_in_context

        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return {k.encode("latin-1"): v.encode("latin-1") for k, v in carrier.items()}

    def end(self, span: Any, fields: Mapping[str, Any], at: float) -> None:
        """End a request's span at a Unix time, with the fields of its log line."""
        from opentelemetry.trace import StatusCode

        for name, value in fields.items():
            if value is not None:
                span.set_attribute(f"attnserve.{name}", value)
        if fields.get("status", 0) >= 500:
            span.set_status(StatusCode.ERROR)
        span.end(int(at * 1e9))

    def close(self) -> None:
        """Send what has not been sent yet."""
        self._provider.shutdown()


def tracer() -> Tracer | None:
    """Return the tracer if the environment asks for one and OpenTelemetry is installed."""
    if not any(os.environ.get(name) for name in WHERE_TO):
        return None
    try:
        return Tracer()
    except ImportError as error:
        log.warning("no traces: %s; install opentelemetry-exporter-otlp-proto-http", error)
        return None
