"""What the gateway counts, and the ASGI middleware that counts it for every route."""

import time

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    disable_created_metrics,
)
from starlette.types import ASGIApp, Message, Receive, Scope, Send

CLIENT_LEFT = "499"
"""The status counted for a request whose client left before an answer began (nginx's number)."""

TTFT_BUCKETS = (
    0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0,
)  # fmt: skip


disable_created_metrics()  # they are half of the page, and nobody reads them


class Metrics:
    """One registry with everything in it, so that an app in a test starts from zero."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "attnserve_requests",
            "Requests answered; status 499: the client left before the answer began",
            ["route", "status"],
            registry=self.registry,
        )
        self.in_flight = Gauge(
            "attnserve_requests_in_flight",
            "Requests that have arrived and are not yet answered in full",
            registry=self.registry,
        )
        self.ttft = Histogram(
            "attnserve_time_to_first_token_seconds",
            "From a streamed request's arrival to the first byte of its answer's body",
            ["route"],
            buckets=TTFT_BUCKETS,
            registry=self.registry,
        )
        self.upstream_errors = Counter(
            "attnserve_upstream_errors",
            "Requests that the upstream failed, by reason",
            ["reason"],
            registry=self.registry,
        )
        self.disconnects = Counter(
            "attnserve_client_disconnects",
            "Requests cut off by their client, and therefore aborted upstream",
            ["route"],
            registry=self.registry,
        )


class CountRequests:
    """Middleware: requests in flight, and requests by route and status."""

    def __init__(self, app: ASGIApp, metrics: Metrics) -> None:
        self.app = app
        self.metrics = metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Count one request; other kinds of scope pass."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope["attnserve.arrival"] = time.perf_counter()
        status = CLIENT_LEFT

        async def send_and_note(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = str(message["status"])
            await send(message)

        with self.metrics.in_flight.track_inprogress():
            try:
                await self.app(scope, receive, send_and_note)
            except Exception:
                status = "500"  # written further out, by starlette's own error handling
                raise
            finally:
                route = getattr(scope.get("route"), "path", "unmatched")
                self.metrics.requests.labels(route, status).inc()
