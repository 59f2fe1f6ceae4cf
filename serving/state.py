"""What the gateway knows at any moment: its configuration, models, replicas and keys."""

import asyncio
import contextlib
import logging
import pickle
import random
import signal
from functools import partial
from pathlib import Path

from attnserve.files import replacing
from serving.access import Access
from serving.auth import Keys
from serving.config import Config, ConfigError
from serving.config_file import load, signature
from serving.large_bodies import BodyReader
from serving.observability.metrics import Metrics
from serving.observability.pages import MetricsPages
from serving.rate_limit import Account
from serving.shared_limits import SharedAccount, SharedLimits
from serving.unread import UnreadAnswers
from serving.upstream.replica import Replica
from serving.upstream.router import Model, Router

log = logging.getLogger("attnserve")

RELOAD_SECONDS = 1.0
"""How often the configuration's file is checked for a change."""


class GatewayState:
    """The state behind the routes; an async context manager around what runs in the background."""

    def __init__(
        self, config: Config, path: Path | None = None, metrics_file: Path | None = None
    ) -> None:
        """Begin with a configuration, the file that it is from, and where there are several
        workers, the file for the metrics of this one."""
        self.path = path
        self.metrics = Metrics()
        self.pages = MetricsPages(metrics_file, self.metrics.registry) if metrics_file else None
        self.router = Router()
        self.in_flight = 0
        self.held_bytes = 0
        """Of all requests' bodies, as they came."""
        self.unread = UnreadAnswers()
        self.replicas: dict[str, Replica] = {}
        self.keys = Keys(())
        self.bodies = BodyReader()
        self._label_errors: dict[str, object] = {}  # as logged; by the name of the entry
        self._health_checks: dict[Replica, asyncio.Task[None]] = {}
        self._signature = config.signature
        self._reload_now = asyncio.Event()
        self.config = config
        self.bound = config.host
        url = config.redis
        self.shared = SharedLimits(url.get_secret_value()) if url is not None else None
        self._new_account = partial(SharedAccount, self.shared) if self.shared else Account
        self.apply(config)

    def apply(self, config: Config) -> None:
        """Use a configuration from now on: what it still names goes on as it is, replicas that it
        does not name any more finish what they have.

        Raises:
            ConfigError: it has no keys any more, and does not say that this is meant; or it has
                limits that workers cannot share.
        """
        if self.pages is not None:
            config.check_workers()
        if self.keys and not config.keys and not config.open:
            raise ConfigError("there are no keys any more; `open: true` lets every client in")
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
            models[entry.name] = Model(entry, replicas, config.routing, self.metrics)
        self.router.models = models
        self._update_models()
        if self.shared is not None:
            self.shared.refuse = config.redis_down == "refuse"
        self.keys = Keys(config.keys, self.keys, self._new_account)
        self.access = Access(config, self.bound)
        self.config = config
        log.setLevel(config.logging.level.upper())
        for url in old.keys() - self.replicas.keys():
            old[url].drain()
        if self._health_checks:
            self._start_health_checks()
        self.router.wake()

    def _update_models(self) -> None:
        """Have the models be what their servers say; log what is wrong with a label, once."""
        models = self.router.models
        errors: dict[str, object] = {}
        for entry, model in models.items():
            model.update()
            if model.name in models:  # it has an entry of its own beside the one for all names
                model.name = entry
            else:
                model.metrics(model.name)
            pairs = zip(model.replicas, model.servers, strict=True)
            wrong = {replica.url: known.errors for replica, known in pairs if known.errors}
            if found := model.description.errors:
                errors[entry] = (found, wrong)
            if found and errors[entry] != self._label_errors.get(entry):
                log.error("model %s: %s", entry, "; ".join(found), extra={"replicas": [*wrong]})
            elif not found and entry in self._label_errors:
                log.info("model %s: labels and servers agree now", entry)
        self._label_errors = errors

    # In the background

    async def __aenter__(self) -> "GatewayState":
        if self.shared is not None:
            self.shared.start()
        self._start_health_checks()
        self._tasks = [asyncio.create_task(self._reload_on_change())]
        if self.pages is not None:
            self._tasks.append(asyncio.create_task(self.pages.keep_writing()))
        if self.path is not None:
            with contextlib.suppress(ValueError, NotImplementedError):  # not in the main thread
                loop = asyncio.get_running_loop()
                loop.add_signal_handler(signal.SIGHUP, self._reload_now.set)
                signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGHUP})  # of a worker
        return self

    async def __aexit__(self, *_: object) -> None:
        tasks = [*self._tasks, *self._health_checks.values()]
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
        self.bodies.close()
        for replica in self.replicas.values():
            replica.pool.close()
        if self.shared is not None:
            await self.shared.close()
        if self.pages is not None:
            self.pages.write()

    def _start_health_checks(self) -> None:
        """Have one task check each replica of the configuration, and no other."""
        replicas = set(self.replicas.values())
        for replica in self._health_checks.keys() - replicas:
            self._health_checks.pop(replica).cancel()
        for replica in replicas - self._health_checks.keys():
            self._health_checks[replica] = asyncio.create_task(self._check_health(replica))

    async def _check_health(self, replica: Replica) -> None:
        while True:
            before = replica.info
            try:
                await replica.check_health()
                if replica.info != before:
                    self._update_models()
            except Exception:  # a task that dies would leave its replica as it was for ever
                log.exception("a health check failed", extra={"replica": replica.url})
            self.router.wake()
            # Not all at once, nor all gateways together.
            await asyncio.sleep(replica.config.health.every * random.uniform(0.9, 1.1))

    # A changed configuration

    async def _reload_on_change(self) -> None:
        while self.path is not None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(RELOAD_SECONDS):
                    await self._reload_now.wait()
            if self._reload_now.is_set() or signature(self.path) != self._signature:
                self._reload_now.clear()
                await self.reload()

    async def reload(self) -> None:
        """Read the file again; a bad one is refused in one line and changes nothing."""
        assert self.path is not None
        self._signature = signature(self.path)
        try:
            config = await asyncio.to_thread(load, self.path)  # of many keys, 0.1 s
            for name in ("host", "port", "redis"):
                if getattr(config, name) != getattr(self.config, name):
                    log.warning("a changed %s needs a restart", name)
            self.apply(config)
        except ConfigError as error:
            self.metrics.reloads.labels("refused").inc()
            log.error("configuration refused, the old one stays: %s", error)
            return
        if self.pages is not None:
            await asyncio.to_thread(keep_config, config, self.pages.file)
        self.metrics.reloads.labels("used").inc()
        log.info("configuration reloaded")


def keep_config(config: Config, metrics_file: Path) -> None:
    """Keep the configuration of a worker, for the one that may come in its place."""
    with replacing(kept_config(metrics_file)) as file:
        file.write_bytes(pickle.dumps(config))


def kept_config(metrics_file: Path) -> Path:
    """Return where a worker keeps its configuration, for the one that may come in its place."""
    return metrics_file.with_suffix(".config")
