"""What the gateway knows at any moment: its configuration, models, replicas, keys and queue."""

import asyncio
import contextlib
import logging
import random
import signal
from pathlib import Path

from serving.auth import Keys
from serving.config import EVERY, Config, ConfigError, load
from serving.observability.metrics import LiveState, Metrics, ModelMetrics
from serving.openai.errors import no_such_model
from serving.upstream.replica import Replica
from serving.upstream.router import Model, Queue

log = logging.getLogger("attnserve")

LOOK_AGAIN_SECONDS = 1.0
"""How often the configuration's file is looked at."""

MOST_NAMES = 1000
"""Names of models that get metrics of their own where an entry takes every name."""


class Gateway:
    """The state behind the routes; an async context manager around what runs in the background."""

    def __init__(self, config: Config, path: Path | None = None) -> None:
        self.path = path
        self.metrics = Metrics()
        self.metrics.registry.register(LiveState(self))
        self.queue = Queue()
        self.in_flight = 0
        self.replicas: dict[str, Replica] = {}
        self.keys = Keys(())
        self._models: dict[str, Model] = {}
        self._counts: dict[tuple[str, str, str], ModelMetrics] = {}
        self._errors: dict[str, object] = {}  # of labels, as logged; by the name of the entry
        self._watchers: dict[Replica, asyncio.Task[None]] = {}
        self._seen = signature(path)
        self.config = config
        self.apply(config)

    def apply(self, config: Config) -> None:
        """Use a configuration from now on: what it still names goes on as it is, replicas that it
        does not name any more finish what they have."""
        old = self.replicas
        self.replicas = {}
        models = {}
        for entry in config.models:
            for url in entry.replicas:
                replica = self.replicas.get(url) or old.get(url)
                replica = replica or Replica(url, config, entry.api_key)
                replica.configure(config, entry.api_key)
                self.replicas[url] = replica
            replicas = [self.replicas[url] for url in entry.replicas]
            models[entry.name] = Model(entry, replicas, config.routing)
        self._models = models
        self._note_what_runs()
        self.keys = Keys(config.keys, self.keys)
        self.config = config
        log.setLevel(config.logging.level.upper())
        for url in old.keys() - self.replicas.keys():
            old[url].drain()
        if self._watchers:
            self._watch()
        self.queue.wake()

    def _note_what_runs(self) -> None:
        """Have the models be what their servers say; log what is wrong with a label, once."""
        errors: dict[str, object] = {}
        for entry, model in self._models.items():
            model.update()
            if (
                model.name in self._models
            ):  # it has an entry of its own beside the one for all names
                model.name = entry
            else:
                self.known(model, model.name)
            pairs = zip(model.replicas, model.servers, strict=True)
            wrong = {replica.url: known.errors for replica, known in pairs if known.errors}
            if found := model.description.errors:
                errors[entry] = (found, wrong)
            if found and errors[entry] != self._errors.get(entry):
                log.error("model %s: %s", entry, "; ".join(found), extra={"replicas": [*wrong]})
            elif not found and entry in self._errors:
                log.info("model %s: labels and servers agree now", entry)
        self._errors = errors

    def model(self, name: str) -> Model:
        """The model of a name.

        Raises:
            ApiError: 404; there is none.
        """
        found = self._models.get(name) or self._models.get(EVERY)
        if found is None:
            raise no_such_model(name)
        return found

    def all_models(self) -> list[Model]:
        """The models of the configuration, in its order."""
        return list(self._models.values())

    def counts(self, model: Model, name: str) -> ModelMetrics:
        """The metrics of a model under a name. With an entry for every name, only names that were
        answered get their own (see `known`): anybody could make up others without end."""
        labels = (model.entry.name, *model.labels)
        if model.entry.name == EVERY:
            named = (name, *model.labels)
            labels = named if named in self._counts else (EVERY, "", "")
        if labels not in self._counts:
            self._counts[labels] = self.metrics.of(*labels)
        return self._counts[labels]

    def known(self, model: Model, name: str) -> ModelMetrics:
        """The same, for a name that a server has answered."""
        labels = (name, *model.labels)
        if labels not in self._counts and len(self._counts) < MOST_NAMES:
            self._counts[labels] = self.metrics.of(*labels)
        return self.counts(model, name)

    # In the background

    async def __aenter__(self) -> "Gateway":
        self._watch()
        self._reloader = asyncio.create_task(self._look_for_changes())
        if self.path is not None:
            with contextlib.suppress(ValueError, NotImplementedError):  # not in the main thread
                loop = asyncio.get_running_loop()
                loop.add_signal_handler(signal.SIGHUP, self.reload)
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [self._reloader, *self._watchers.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        for replica in self.replicas.values():
            replica.pool.close()

    def _watch(self) -> None:
        """Have one task look after each replica."""
        for replica in self._watchers.keys() - set(self.replicas.values()):
            self._watchers.pop(replica).cancel()
        for replica in set(self.replicas.values()) - self._watchers.keys():
            self._watchers[replica] = asyncio.create_task(self._look_after(replica))

    async def _look_after(self, replica: Replica) -> None:
        while True:
            before = replica.info
            try:
                await replica.look()
                if replica.info != before:
                    self._note_what_runs()
            except Exception:  # a watcher that dies would leave its replica as it was for ever
                log.exception("the look after a replica failed", extra={"replica": replica.url})
            self.queue.wake()
            # Not all at once, nor all gateways together.
            await asyncio.sleep(replica.config.health.every * random.uniform(0.9, 1.1))

    # A changed configuration

    async def _look_for_changes(self) -> None:
        while self.path is not None:
            await asyncio.sleep(LOOK_AGAIN_SECONDS)
            if signature(self.path) != self._seen:
                self.reload()

    def reload(self) -> None:
        """Read the file again; a bad one is refused in one line and changes nothing."""
        assert self.path is not None
        self._seen = signature(self.path)
        try:
            config = load(self.path)
            for name in ("host", "port"):
                if getattr(config, name) != getattr(self.config, name):
                    log.warning("a changed %s needs a restart", name)
            self.apply(config)
        except ConfigError as error:
            self.metrics.reloads.labels("refused").inc()
            log.error("configuration refused, the old one stays: %s", error)
            return
        self.metrics.reloads.labels("used").inc()
        log.info("configuration reloaded")


def signature(path: Path | None) -> tuple[int, ...] | None:
    """Changes when a file does; None if it is not there."""
    if path is None:
        return None
    try:
        stat = path.stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size, stat.st_ino
