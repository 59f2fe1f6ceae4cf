"""The metrics of a gateway of several workers: each writes its page to a file, any adds them up."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.parser import text_string_to_metric_families
from prometheus_client.registry import Collector

from attnserve.files import write_text

WRITE_SECONDS = 1.0
"""How old the other workers' numbers can be."""

SUMMED = frozenset(
    {
        "attnserve_requests_in_flight",
        "attnserve_queue_length",
        "attnserve_replica_in_flight",
        "process_resident_memory_bytes",
        "process_virtual_memory_bytes",
        "process_open_fds",
    }
)
"""Gauges whose values of all workers add up; of the others, the worker that is asked says its own.
Counters and histograms always add up, with those of workers that have ended."""


class MetricsPages:
    """The pages of all workers, of which this process writes one."""

    def __init__(self, file: Path, registry: CollectorRegistry) -> None:
        self.file = file
        self.registry = registry
        # What the worker counted that has ended and in whose place this one is goes on from there.
        before = parsed(file.read_text()) if file.exists() else ()
        self.before = [family for family in before if family.type != "gauge"]

    def write(self) -> dict[str, Metric]:
        """Write this worker's page to its file, and return what is on it."""
        families = {family.name: family for family in self.registry.collect()}
        for family in self.before:
            add(families, family)
        write_text(self.file, rendered(families).decode())
        return families

    async def keep_writing(self) -> None:
        """Write it again and again."""
        while True:
            self.write()
            await asyncio.sleep(WRITE_SECONDS)

    def page(self) -> bytes:
        """Return the page of the whole gateway."""
        families = self.write()
        for file in self.file.parent.glob("*.prom"):
            if file != self.file:
                for family in parsed(file.read_text()):
                    if family.type != "gauge" or family.name in SUMMED:
                        add(families, family)
        return rendered(families)


def parsed(page: str) -> Iterator[Metric]:
    """Yield the metrics of a page in Prometheus' text format."""
    yield from text_string_to_metric_families(page)


def rendered(families: dict[str, Metric]) -> bytes:
    """Return a page in Prometheus' text format."""
    registry = CollectorRegistry()
    registry.register(Families(families))
    return generate_latest(registry)


def add(families: dict[str, Metric], other: Metric) -> None:
    """Add the values of a metric to those of the metric of the same name."""
    to = families.setdefault(other.name, Metric(other.name, other.documentation, other.type))
    places = {(s.name, *sorted(s.labels.items())): i for i, s in enumerate(to.samples)}
    for sample in other.samples:
        at = places.get((sample.name, *sorted(sample.labels.items())))
        if at is None:
            to.samples.append(sample)
        else:
            old = to.samples[at]
            to.samples[at] = old._replace(value=old.value + sample.value)


class Families(Collector):
    """Metrics that are there already."""

    def __init__(self, families: dict[str, Metric]) -> None:
        self.families = families

    def collect(self) -> Iterator[Metric]:
        """Yield them."""
        yield from self.families.values()
