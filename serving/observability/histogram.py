"""A histogram for one thread, because it is called for every streamed token: no locks, and a
bisection where prometheus_client's own walks along the buckets."""

from bisect import bisect_left
from collections.abc import Iterable, Sequence
from itertools import accumulate

from prometheus_client import CollectorRegistry
from prometheus_client.core import HistogramMetricFamily, Metric
from prometheus_client.registry import Collector


class Child:
    """The observations under one set of labels."""

    __slots__ = ("_bounds", "counts", "sum")

    def __init__(self, bounds: Sequence[float]) -> None:
        self._bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def observe(self, value: float) -> None:
        """Count one value."""
        self.counts[bisect_left(self._bounds, value)] += 1
        self.sum += value


class Histogram(Collector):
    """One metric; `labels` gives the child to observe with."""

    def __init__(
        self,
        name: str,
        text: str,
        labels: Sequence[str],
        bounds: Sequence[float],
        registry: CollectorRegistry,
    ) -> None:
        self.name, self.text, self.label_names, self.bounds = name, text, labels, bounds
        self._children: dict[tuple[str, ...], Child] = {}
        registry.register(self)

    def labels(self, *values: str) -> Child:
        """Return the child of these labels' values."""
        if values not in self._children:
            self._children[values] = Child(self.bounds)
        return self._children[values]

    def collect(self) -> Iterable[Metric]:
        """Return the metric for the registry."""
        family = HistogramMetricFamily(self.name, self.text, labels=self.label_names)
        bounds = [*(str(float(b)) for b in self.bounds), "+Inf"]
        for values, child in self._children.items():
            buckets = list(zip(bounds, accumulate(child.counts), strict=True))
            family.add_metric(values, buckets, child.sum)
        return [family]
