"""Which replica gets a request, and the queue for when none has room."""

import asyncio
import hashlib
from collections import defaultdict, deque
from collections.abc import Callable, Collection, Sequence

from serving.config import EVERY, ModelEntry, Routing
from serving.openai.errors import ApiError
from serving.upstream.replica import Replica, Turn
from serving.upstream.vllm_metrics import Description, describe, numbers, one_or_all, together

Lookup = Callable[[str], "Model"]
"""Finds a model by its name, or raises an ApiError with status 404."""

SHORT_PROMPT = 32
"""Bytes; a shorter beginning is not worth a cache, so the least loaded server gets it."""


class Model:
    """A model of the configuration and the replicas that serve it."""

    def __init__(self, entry: ModelEntry, replicas: Sequence[Replica], routing: Routing) -> None:
        self.entry = entry
        self.replicas = replicas
        self.routing = routing
        self.update()

    def update(self) -> None:
        """Take over what the replicas say that they run; call it when one says something else."""
        self.servers = [describe(self.entry, replica.info) for replica in self.replicas]
        """What is known of each replica."""
        self.description = together(self.servers)
        self.labels = (self.description.variant, self.description.bits)
        self.bits = one_or_all(numbers(self.description.bits))
        self.name = self.entry.name
        """The model's real name: an entry for every name has the one that its servers say."""
        if self.name == EVERY:
            self.name = self.description.info.model_name or EVERY

    def server(self, url: str | None) -> Description:
        """Return what is known of the replica with this address, or of all if it has gone."""
        pairs = zip(self.replicas, self.servers, strict=True)
        return next((known for r, known in pairs if r.url == url), self.description)

    def usable(self, tried: Collection[Replica] = ()) -> list[Replica]:
        """The replicas that may be asked: of those whose circuit lets a request through the ones
        that are healthy, or all if none is (a server that is merely slow is better than none)."""
        accepting = [r for r in self.replicas if r.accepts and r not in tried]
        return [r for r in accepting if r.healthy is not False] or accepting

    def choose(self, candidates: Sequence[Replica], prefix: bytes) -> Replica:
        """One of the candidates, by the policy; their order among equals is the configuration's."""
        if len(candidates) == 1:
            return candidates[0]
        if self.routing.policy == "prefix" and len(prefix) >= SHORT_PROMPT:
            # Consistent hashing with bounded loads (arXiv:1608.01350): rendezvous order, and the
            # first in it that is not overloaded. A replica that comes or goes moves only its own.
            bound = self.routing.overload * (1 + sum(r.load for r in candidates)) / len(candidates)
            for replica in sorted(candidates, key=lambda r: weight(r, prefix), reverse=True):
                if replica.load < bound:
                    return replica
        return min(candidates, key=lambda r: r.load)


def weight(replica: Replica, prefix: bytes) -> bytes:
    """The rank of a replica for a prefix: random, but the same in every gateway."""
    return hashlib.blake2b(prefix, key=replica.url.encode()[-64:], digest_size=8).digest()


class Queue:
    """Requests that wait for room, first come, first served; one line for each model's name."""

    def __init__(self) -> None:
        self._lines: defaultdict[str, deque[asyncio.Future[None]]] = defaultdict(deque)

    def length(self, name: str) -> int:
        """How many wait for a model."""
        return len(self._lines[name]) if name in self._lines else 0

    def wake(self) -> None:
        """There may be room: the first of each line looks."""
        for line in self._lines.values():
            if line and not line[0].done():
                line[0].set_result(None)

    async def turn(self, lookup: Lookup, name: str, prefix: bytes) -> Turn:
        """A replica for a request, waiting for one with room if need be.

        Args:
            lookup: asked again after each wait, because the configuration may have changed.
            name: the model that the request asks for.
            prefix: the beginning of its prompt.

        Raises:
            ApiError: 404 no such model; 503 no replica is reachable, or too many wait, or it
                waited too long.
        """
        model = lookup(name)
        line = self._lines.get(model.entry.name)
        if not line and (turn := self._take(model, prefix)):
            return turn
        return await self._wait(lookup, name, prefix)

    def _take(self, model: Model, prefix: bytes) -> Turn | None:
        """A turn at a replica with room; None if none has."""
        usable = model.usable()
        if not usable:
            wait = min(r.closed_for for r in model.replicas)
            message = "The model server cannot be reached."
            raise ApiError(503, message, code="upstream_unreachable", retry_after=wait or 1.0)
        with_room = [r for r in usable if r.has_room]
        return model.choose(with_room, prefix).begin() if with_room else None

    async def _wait(self, lookup: Lookup, name: str, prefix: bytes) -> Turn:
        model = lookup(name)
        limits = model.replicas[0].config.limits
        line = self._lines[model.entry.name]
        if len(line) >= limits.queue_size:
            raise overloaded(f"{len(line)} requests are waiting already")
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        line.append(place)
        try:
            async with asyncio.timeout(limits.queue_seconds):
                while True:
                    if line[0] is place and (turn := self._take(lookup(name), prefix)):
                        return turn
                    await place
                    at = line.index(place)
                    place = line[at] = asyncio.get_running_loop().create_future()
        except TimeoutError:
            raise overloaded(f"no room within {limits.queue_seconds:g} s") from None
        finally:
            line.remove(place)
            self.wake()


def overloaded(why: str) -> ApiError:
    """OpenAI's 503."""
    message = f"The engine is currently overloaded, please try again later ({why})."
    return ApiError(503, message, code="engine_overloaded", retry_after=1.0)
