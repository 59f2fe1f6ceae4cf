"""What the gateway counts. docs/GATEWAY.md has the list; the dashboard asks for nothing else."""

from collections.abc import Callable, Sequence
from functools import cache

from prometheus_client import CollectorRegistry, Counter, ProcessCollector, disable_created_metrics

from serving.observability.histogram import Histogram

CLIENT_LEFT = 499
"""The status counted for a request whose client left before an answer began (nginx's number)."""

SECONDS = (
    0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0,
)  # fmt: skip
NATS = (1e-6, 1e-5, 1e-4, 0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
DELTAS = (-3.0, -1.0, -0.3, -0.1, -0.03, -0.01, -0.001, 0.001, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0)

Labels = tuple[str, str, str]
"""A model's name, variant and bits."""

MODEL = ("model", "variant", "bits")

OTHERS: Labels = ("*", "", "")
"""Of names that nobody serves, and of what is beyond `MAX_MODELS`."""

MAX_MODELS = 1000
"""Most labels: a server that says another variant each time has no more of them."""

disable_created_metrics()  # they are half of the page, and nobody reads them


class Metrics:
    """One registry with everything in it, so that an app in a test starts from zero."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        self.models: dict[Labels, ModelMetrics] = {}

        counter, histogram = self._counter, self._histogram
        self.requests = counter(
            "requests",
            "Requests that have ended. Status 499: the client left before the answer began.",
            "route",
            *MODEL,
            "status",
        )
        self.ttft = histogram(
            "time_to_first_token_seconds",
            "Time from the arrival of a streamed request to the first event of its answer.",
        )
        self.itl = histogram(
            "inter_token_latency_seconds", "Time between two pieces of a stream that have tokens."
        )
        self.duration = histogram(
            "request_duration_seconds",
            "Time from the arrival of a request to its end; aborted requests are included.",
        )
        self.queue = histogram(
            "queue_seconds", "Time that a request waited for a replica with room."
        )
        self.prompt_tokens = counter("prompt_tokens", "Tokens of all prompts.", *MODEL)
        self.completion_tokens = counter("completion_tokens", "Tokens of all answers.", *MODEL)
        self.aborts = counter(
            "aborts",
            "Requests whose client left, by what they waited for: body, queue, "
            "before_first_token, mid_stream (the next token) or whole (an answer in one piece).",
            *MODEL,
            "stage",
        )
        self.retries = counter(
            "retries",
            "Requests that were sent to another replica, by why the replica before failed.",
            *MODEL,
            "reason",
        )
        self.upstream_errors = counter(
            "upstream_errors", "Requests that a replica failed, by reason.", *MODEL, "reason"
        )
        self.errors = counter(
            "errors",
            "Errors that the gateway itself answered with, by code; upstream_error: those that a "
            "server has sent inside a stream.",
            *MODEL,
            "code",
        )
        self.key_requests = counter("key_requests", "Requests with an API key.", "key")
        self.key_tokens = counter("key_tokens", "Tokens of the requests with an API key.", "key")
        self.shadow_answers = counter(
            "shadow_answers",
            "Sampled answers that a model should read, by result: read, busy, too_long, failed or "
            "vocabulary_mismatch.",
            *MODEL,
            "result",
        )
        self.shadow_kl = histogram(
            "shadow_kl",
            "KL divergence, in nats, from the reference model to a model that reads a sampled "
            "answer, at each of its tokens.",
            NATS,
        )
        self.shadow_delta = histogram(
            "shadow_logprob_delta",
            "Log-probability of each token of a sampled answer, the model's less the reference's.",
            DELTAS,
        )
        self.shadow_tokens = counter(
            "shadow_tokens", "Tokens of sampled answers that a model has read.", *MODEL
        )
        self.shadow_disagreements = counter(
            "shadow_disagreements",
            "Tokens of sampled answers at which the model's most likely token is not the "
            "reference's.",
            *MODEL,
        )
        self.connections_cut = counter(
            "connections_cut",
            "Connections of clients that were cut off, by reason: limit (of their number), "
            "not_reading (an answer) or total (its time).",
            "reason",
        )
        for reason in ("limit", "not_reading", "total"):
            self.connections_cut.labels(reason)
        self.reloads = counter(
            "config_reloads",
            "Changes of the configuration file, by result: used or refused.",
            "result",
        )

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"attnserve_{name}", text, labels, registry=self.registry)

    def _histogram(self, name: str, text: str, bounds: Sequence[float] = SECONDS) -> Histogram:
        return Histogram(f"attnserve_{name}", text, MODEL, bounds, self.registry)

    def of_model(self, labels: Labels) -> "ModelMetrics":
        """Return what is counted in each request, for one model."""
        if labels not in self.models and len(self.models) >= MAX_MODELS:
            labels = OTHERS
        if labels not in self.models:
            self.models[labels] = ModelMetrics(self, labels)
        return self.models[labels]


class ModelMetrics:
    """The children of one model: finding them by their labels costs more than counting."""

    def __init__(self, metrics: Metrics, labels: Labels) -> None:
        self.labels = labels
        self.requests: Callable[[str, int], Counter] = cache(
            lambda route, status: metrics.requests.labels(route, *labels, str(status))
        )
        self.ttft = metrics.ttft.labels(*labels)
        self.itl = metrics.itl.labels(*labels)
        self.duration = metrics.duration.labels(*labels)
        self.queue = metrics.queue.labels(*labels)
        self.prompt_tokens = metrics.prompt_tokens.labels(*labels)
        self.completion_tokens = metrics.completion_tokens.labels(*labels)
