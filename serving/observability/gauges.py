"""Gauges that are read off the gateway's state when /metrics is asked for, so none goes stale."""

from collections.abc import Iterable, Iterator

from prometheus_client.core import GaugeMetricFamily, Metric
from prometheus_client.registry import Collector

from serving.observability.metrics import MODEL
from serving.state import GatewayState
from serving.upstream.replica import Replica

MORE = ("embedding_bits", "weight_method", "kv_cache_dtype", "kv_budgets")
"""What else is known of a replica, from its own /metrics."""

REPLICA_GAUGES = {
    "in_flight": "Requests that the gateway has open at a replica.",
    "healthy": "1 if a replica answers its health check, else 0.",
    "circuit_open": "1 if a replica's circuit breaker is not closed, else 0.",
    "kv_cache_usage_ratio": "Part of a replica's KV cache that is in use, from 0 to 1.",
    "kv_cache_used_bytes": "Bytes of a replica's KV cache that are in use, if it says its size.",
    "kv_cache_size_bytes": "Size of a replica's KV cache in bytes, if it says its size.",
    "waiting": "Requests in a replica's own queue.",
}


def replica_values(replica: Replica) -> Iterable[float | None]:
    """Return the values of a replica's gauges, in the order of `REPLICA_GAUGES`; None: unknown."""
    return (
        replica.in_flight,
        replica.healthy is True,
        replica.circuit != "closed",
        replica.kv_usage,
        replica.kv_used_bytes,
        replica.kv_bytes,
        replica.waiting,
    )


class StateGauges(Collector):
    """All gauges of a gateway."""

    def __init__(self, state: GatewayState) -> None:
        self.state = state

    def describe(self) -> Iterable[Metric]:
        """Return nothing: what there is depends on the configuration."""
        return []

    def collect(self) -> Iterator[Metric]:
        """Yield the gauges as of now."""
        state = self.state
        in_flight = gauge("requests_in_flight", "Requests that are not yet answered in full.")
        in_flight.add_metric([], state.in_flight)
        yield in_flight
        queue = gauge("queue_length", "Requests that wait for a replica with room.", *MODEL)
        families = [
            gauge(f"replica_{name}", text, "replica", *MODEL)
            for name, text in REPLICA_GAUGES.items()
        ]
        info = gauge(
            "replica_info",
            "Always 1; the labels say what a replica runs. `unconfirmed` names those of variant "
            "and bits that only the configuration says.",
            "replica",
            *MODEL,
            *MORE,
            "unconfirmed",
        )
        mismatch = gauge(
            "replica_label_mismatch",
            "1 if the configuration says another variant or other bits than the replica, else 0.",
            "replica",
            *MODEL,
        )
        for model in state.router.models.values():
            queue.add_metric([model.name, *model.labels], state.router.queue_length(model))
            for replica, known in zip(model.replicas, model.servers, strict=True):
                labels = [replica.url, model.name, known.variant, known.bits]
                more = [getattr(known.info, name) for name in MORE]
                info.add_metric([*labels, *more, ",".join(known.unconfirmed)], 1)
                mismatch.add_metric(labels, bool(known.errors))
                for family, value in zip(families, replica_values(replica), strict=True):
                    if value is not None:
                        family.add_metric(labels, value)
        yield from (queue, info, mismatch, *families)


def gauge(name: str, text: str, *labels: str) -> GaugeMetricFamily:
    """Return a gauge without values."""
    return GaugeMetricFamily(f"attnserve_{name}", text, labels=labels)
