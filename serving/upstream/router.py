"""Which replica gets a request, and the queue for when none has room."""

import asyncio
import hashlib
from collections import defaultdict, deque
from collections.abc import Collection, Sequence

from serving.config import EVERY, ModelEntry, Routing
from serving.observability.metrics import OTHERS, Metrics, ModelMetrics
from serving.openai.errors import ApiError, no_such_model
from serving.upstream.replica import Attempt, Replica
from serving.upstream.vllm_metrics import (
    Description,
    describe_model,
    describe_server,
    numbers,
    one_or_all,
)

MIN_PREFIX_BYTES = 32
"""A shorter beginning is not worth a prefix cache, so the least loaded server gets it."""


class Model:
    """A model of the configuration and the replicas that serve it."""

    def __init__(
        self, entry: ModelEntry, replicas: Sequence[Replica], routing: Routing, metrics: Metrics
    ) -> None:
        self.entry = entry
        self.replicas = replicas
        self.routing = routing
        self._metrics = metrics
        self.update()

    def update(self) -> None:
        """Take over what the replicas say that they run; to be called when one says another."""
        self.servers = [describe_server(self.entry, replica.info) for replica in self.replicas]
        """What is known of each replica."""
        self.description = describe_model(self.servers)
        self.labels = (self.description.variant, self.description.bits)
        self.bits = one_or_all(numbers(self.description.bits))
        self.name = self.entry.name
        """The model's real name: an entry for every name has the one that its servers say."""
        if self.name == EVERY:
            self.name = self.description.info.model_name or EVERY

    def metrics(self, name: str) -> ModelMetrics:
        """Return what is counted for the model under a name that a client has given.

        Of an entry for every name, only names that a server lists get metrics of their own: anybody
        could make up others without end.
        """
        labels = (name, *self.labels)
        if found := self._metrics.models.get(labels):
            return found
        listed = name == self.name or any(r.models and name in r.models for r in self.replicas)
        if self.entry.name == EVERY and not listed:
            labels = OTHERS
            for replica in self.replicas:
                replica.ask_models = True
        return self._metrics.of_model(labels)

    def server(self, url: str | None) -> Description:
        """Return what is known of the replica with this address, or of all if it has gone."""
        pairs = zip(self.replicas, self.servers, strict=True)
        return next((known for r, known in pairs if r.url == url), self.description)

    def usable(self, name: str | None = None, tried: Collection[Replica] = ()) -> list[Replica]:
        """Return the replicas that may be asked, for the model by this name: of those whose circuit
        lets a request through the ones that have it, and of these the healthy ones; all if none is
        (a server that is merely slow is better than none)."""
        accepting = [r for r in self.replicas if r.accepts and r not in tried]
        having = [r for r in accepting if self._has(r, name)] or accepting
        return [r for r in having if r.healthy is not False] or having

    def _has(self, replica: Replica, name: str | None) -> bool:
        """Return whether a replica has a model, as far as is known. Of an entry for every name, a
        list of those that a replica lacks would have no end."""
        if self.entry.name == EVERY:
            return name is None or replica.models is None or name in replica.models
        return self.entry.name not in replica.lacks

    def another(self, name: str, tried: Collection[Replica], lacked: bool) -> Replica | None:
        """Return a replica to try after others; None if there is none, or where those lacked the
        model, none that may have it."""
        usable = self.usable(name, tried)
        if lacked and self.entry.name == EVERY:
            usable = [r for r in usable if self._has(r, name)]
        return self.choose(usable, b"") if usable else None

    def context_length(self, name: str) -> int:
        """Return the tokens of the model's context, of the longest where replicas differ; 0: not
        known."""
        return max((r.models.get(name, 0) for r in self.replicas if r.models), default=0)

    def choose(self, candidates: Sequence[Replica], prefix: bytes) -> Replica:
        """Return one of the candidates, by the policy; among equals, the configuration's first."""
        if len(candidates) == 1:
            return candidates[0]
        if self.routing.policy == "prefix" and len(prefix) >= MIN_PREFIX_BYTES:
            # Consistent hashing with bounded loads (arXiv:1608.01350): rendezvous order, and the
            # first in it that is not overloaded. A replica that comes or goes moves only its own.
            bound = self.routing.overload * (1 + sum(r.load for r in candidates)) / len(candidates)
            for replica in sorted(candidates, key=lambda r: rank(r, prefix), reverse=True):
                if replica.load < bound:
                    return replica
        return min(candidates, key=lambda r: r.load)

    def attempt(self, name: str, prefix: bytes) -> Attempt | None:
        """Return an attempt at a replica with room for the model by this name; None if none has.

        Raises:
            ApiError: 503; no replica can be asked.
        """
        usable = self.usable(name)
        if not usable:
            wait = min(r.seconds_open for r in self.replicas)
            message = "The model server cannot be reached."
            raise ApiError(503, message, code="upstream_unreachable", retry_after=wait or 1.0)
        with_room = [r for r in usable if r.has_room]
        return Attempt(self.choose(with_room, prefix)) if with_room else None


def rank(replica: Replica, prefix: bytes) -> bytes:
    """Return the rank of a replica for a prefix: random, but the same in every gateway."""
    return hashlib.blake2b(prefix, key=replica.url.encode()[-64:], digest_size=8).digest()


class Router:
    """The models by name, and a queue for each of requests that wait for room: first come, first
    served."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        """By the names of their entries; replaced when the configuration changes."""
        self._queues: defaultdict[str, deque[asyncio.Future[None]]] = defaultdict(deque)

    def model(self, name: str) -> Model:
        """Return the model of a name.

        Raises:
            ApiError: 404; there is none.
        """
        found = self.models.get(name) or self.models.get(EVERY)
        if found is None:
            raise no_such_model(name)
        return found

    def queue_length(self, model: Model) -> int:
        """Return how many requests wait for a model."""
        return len(self._queues.get(model.entry.name, ()))

    def wake(self) -> None:
        """Have the first of each queue look for room."""
        for queue in self._queues.values():
            if queue and not queue[0].done():
                queue[0].set_result(None)

    async def attempt(self, model: Model, name: str, prefix: bytes) -> Attempt:
        """Return an attempt at a replica of a model, after waiting for one with room if need be.

        Args:
            model: the model.
            name: its name in the request.
            prefix: the beginning of the prompt.

        Raises:
            ApiError: 404 no such model any more; 503 no replica can be reached, or too many
                requests wait, or this one waited too long.
        """
        if not self._queues.get(model.entry.name) and (attempt := model.attempt(name, prefix)):
            return attempt
        limits = model.replicas[0].config.limits
        queue = self._queues[model.entry.name]
        if len(queue) >= limits.queue_size:
            raise overloaded(f"{len(queue)} requests are waiting already")
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        queue.append(place)
        try:
            async with asyncio.timeout(limits.queue_seconds):
                while True:
                    if queue[0] is place and (attempt := self.model(name).attempt(name, prefix)):
                        return attempt
                    await place
                    at = queue.index(place)
                    place = queue[at] = asyncio.get_running_loop().create_future()
        except TimeoutError:
            raise overloaded(f"no room within {limits.queue_seconds:g} s") from None
        finally:
            queue.remove(place)
            self.wake()


def overloaded(why: str) -> ApiError:
    """Return OpenAI's 503."""
    message = f"The engine is currently overloaded, please try again later ({why})."
    return ApiError(503, message, code="engine_overloaded", retry_after=1.0)
