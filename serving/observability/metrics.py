"""What the gateway counts. docs/GATEWAY.md has the list; the dashboard asks for nothing else."""

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

from prometheus_client import (
    CollectorRegistry,
    Counter,
    ProcessCollector,
    disable_created_metrics,
)
from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.compare.kl import Drift
from serving.observability.histogram import Histogram

if TYPE_CHECKING:
    from serving.state import Gateway

CLIENT_LEFT = 499
"""The status counted for a request whose client left before an answer began (nginx's number)."""

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip

MODEL = ("model", "variant", "bits")
MORE = ("embedding_bits", "weight_method", "kv_cache_dtype", "kv_budgets", "unconfirmed")
"""What else is known of a replica; the last: labels that only the configuration says."""

NATS = (1e-6, 1e-5, 1e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DELTAS = (-3.0, -1.0, -0.3, -0.1, -0.03, -0.01, -0.001, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

disable_created_metrics()  # they are half of the page, and nobody reads them


class Metrics:
    """One registry with everything in it, so that an app in a test starts from zero."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.requests = self._counter(
            "requests",
            "Requests answered; status 499: the client left before the answer began",
            "route",
            *MODEL,
            "status",
        )
        self.ttft = self._histogram(
            "time_to_first_token_seconds",
            "From a streamed request's arrival to the first event of its answer",
        )
        self.itl = self._histogram(
            "inter_token_latency_seconds", "Between two pieces of a stream that have tokens"
        )
        self.duration = self._histogram(
            "request_duration_seconds", "From a request's arrival to its end, aborted ones included"
        )
        self.queue = self._histogram(
            "queue_seconds", "From a request's parsed body to a replica with room for it"
        )
        self.prompt_tokens = self._counter("prompt_tokens", "Tokens of prompts", *MODEL)
        self.completion_tokens = self._counter("completion_tokens", "Tokens of answers", *MODEL)
        self.aborts = self._counter(
            "aborts",
            "Requests whose client left: body, queue, before_first_token, mid_stream, whole",
            *MODEL,
            "stage",
        )
        self.retries = self._counter(
            "retries", "Requests sent to a further replica, by what failed at the one before",
            *MODEL, "reason",
        )  # fmt: skip
        self.upstream_errors = self._counter(
            "upstream_errors", "Attempts that a replica failed, by reason", *MODEL, "reason"
        )
        self.errors = self._counter(
            "errors", "Answers that are errors of the gateway's own, by their code", *MODEL, "code"
        )
        self.key_requests = self._counter("key_requests", "Requests of a key", "key")
        self.key_tokens = self._counter("key_tokens", "Tokens of a key's requests", "key")
        self.shadow_answers = self._counter(
            "shadow_answers",
            "Answers for a model to read: read, busy, too_long, failed, vocabulary_mismatch",
            *MODEL,
            "result",
        )
        self.shadow_kl = self._histogram(
            "shadow_kl",
            "KL from the reference to a model at a token of a sampled answer, nats",
            NATS,
        )
        self.shadow_delta = self._histogram(
            "shadow_logprob_delta",
            "Logprob of a token of a sampled answer, the model's less the reference's",
            DELTAS,
        )
        self.shadow_tokens = self._counter(
            "shadow_tokens", "Tokens of sampled answers that a model has read", *MODEL
        )
        self.shadow_disagreements = self._counter(
            "shadow_disagreements", "Those whose most likely token is not the reference's", *MODEL
        )
        self.reloads = self._counter(
            "config_reloads",
            "Changed configurations, by what came of them: used, refused",
            "result",
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"attnserve_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, bounds: Sequence[float] = SECONDS) -> Histogram:
        return Histogram(f"attnserve_{name}", text, MODEL, bounds, self.registry)

    def of(self, model: str, variant: str, bits: str) -> "ModelMetrics":
        """What is counted in each request, for one model."""
        return ModelMetrics(self, (model, variant, bits))

    def shadow(self, labels: tuple[str, str, str], drifts: Iterable[Drift]) -> None:
        """Count what a model makes of the tokens of one answer."""
        kl, delta = self.shadow_kl.labels(*labels), self.shadow_delta.labels(*labels)
        tokens = disagreements = 0
        for one in drifts:
            kl.observe(one.kl)
            delta.observe(one.delta)
            tokens += 1
            disagreements += not one.agrees
        self.shadow_tokens.labels(*labels).inc(tokens)
        self.shadow_disagreements.labels(*labels).inc(disagreements)


class ModelMetrics:
    """The children of one model: finding them by their labels costs more than counting."""

    def __init__(self, metrics: Metrics, labels: tuple[str, str, str]) -> None:
        self.labels = labels
        self.ttft = metrics.ttft.labels(*labels)
        self.itl = metrics.itl.labels(*labels)
        self.duration = metrics.duration.labels(*labels)
        self.queue = metrics.queue.labels(*labels)
        self.prompt_tokens = metrics.prompt_tokens.labels(*labels)
        self.completion_tokens = metrics.completion_tokens.labels(*labels)


class LiveState(Collector):
    """Gauges that are read off the gateway when somebody asks, so that none goes stale."""

    def __init__(self, gateway: "Gateway") -> None:
        self.gateway = gateway

    def describe(self) -> Iterable[Metric]:
        """Nothing before it is asked."""
        return []

    def collect(self) -> Iterator[Metric]:
        """The gauges as of now."""
        gateway = self.gateway
        flying = GaugeMetricFamily(
            "attnserve_requests_in_flight", "Requests that are not yet answered in full"
        )
        flying.add_metric([], gateway.in_flight)
        yield flying
        queue = self._family("queue_length", "Requests that wait for a replica with room", *MODEL)
        replicas = [
            ("in_flight", "Requests of this gateway at a replica", lambda r: r.in_flight),
            ("healthy", "1: a replica answers its health check", lambda r: r.healthy is True),
            (
                "circuit_open",
                "1: a replica's circuit is not closed",
                lambda r: r.circuit != "closed",
            ),
            ("kv_cache_usage_ratio", "Part of a replica's KV cache in use", lambda r: r.kv_usage),
            ("kv_cache_used_bytes", "The same in bytes, if it says", lambda r: r.kv_used_bytes),
            ("kv_cache_size_bytes", "A replica's whole KV cache", lambda r: r.kv_bytes),
            ("waiting", "Requests in a replica's own queue", lambda r: r.waiting),
        ]
        families = [
            (self._family(f"replica_{name}", text, "replica", *MODEL), value)
            for name, text, value in replicas
        ]
        runs = self._family("replica_info", "What a replica runs", "replica", *MODEL, *MORE)
        wrong = self._family(
            "replica_label_mismatch",
            "1: the configuration's labels say something else than the replica",
            "replica",
            *MODEL,
        )
        for model in gateway.all_models():
            waiting = gateway.queue.length(model.entry.name)
            queue.add_metric([model.name, *model.labels], waiting)
            for replica, known in zip(model.replicas, model.servers, strict=True):
                labels = [replica.url, model.name, known.variant, known.bits]
                more = [getattr(known.info, name) for name in MORE[:-1]]
                runs.add_metric([*labels, *more, ",".join(known.unconfirmed)], 1)
                wrong.add_metric(labels, bool(known.errors))
                for family, value in families:
                    if (found := value(replica)) is not None:
                        family.add_metric(labels, found)
        yield queue
        yield runs
        yield wrong
        for family, _ in families:
            yield family

    @staticmethod
    def _family(name: str, text: str, *labels: str) -> GaugeMetricFamily:
        return GaugeMetricFamily(f"attnserve_{name}", text, labels=labels)
