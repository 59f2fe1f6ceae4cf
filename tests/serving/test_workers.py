"""A gateway of several processes: one port, one page of metrics, and an end for all of them."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge

from serving.auth import digest
from serving.observability.metrics import Metrics
from serving.observability.pages import MetricsPages
from serving.workers import MAX_YOUNG_DEATHS, backoff
from tests.servers import COMMON_ENV, Server, end_group, free_port, spawn, wait_until_healthy
from tests.serving.helpers import ask, configured, metric
from tests.serving.standin import standin, wait_for

pytestmark = pytest.mark.integration

BODY = {"model": "m", "prompt": "x", "max_tokens": 2}
ANSWERED = "attnserve_requests_total{"


@pytest.fixture
def gateway(tmp_path: Path) -> Iterator[Server]:
    """Yield a gateway of three workers in front of a scripted server."""
    with standin() as upstream:
        port = free_port()
        url, file = f"http://127.0.0.1:{port}", tmp_path / "log"
        env = {"UPSTREAM_URL": upstream.url, "GATEWAY_PORT": str(port)}
        process = spawn([sys.executable, "-m", "serving", "--workers=3"], file, env)
        try:
            wait_until_healthy(url, process, file, timeout=60, path="/metrics")
            yield Server(url, process.pid, file)
        finally:
            end_group(process)


def workers(gateway: Server) -> list[psutil.Process]:
    """Return the processes that serve."""
    children = psutil.Process(gateway.pid).children()
    with contextlib.suppress(psutil.ZombieProcess, psutil.NoSuchProcess):  # one ends meanwhile
        return [p for p in children if "spawn_main" in " ".join(p.cmdline())]
    return []


def answered(gateway: Server) -> float:
    """Return how many completions the gateway says that it has answered."""
    return metric(gateway.url, ANSWERED, 'route="/v1/completions"')


def test_all_workers_serve_and_their_metrics_add_up(gateway: Server) -> None:
    assert len(workers(gateway)) == 3
    for _ in range(30):  # each on a connection of its own
        assert ask(gateway.url, "POST", "/v1/completions", BODY).status == 200
    wait_for(lambda: answered(gateway) == 30, "every worker asked knows of all requests")
    assert metric(gateway.url, "attnserve_request_duration_seconds_count") == 30


def test_a_worker_that_ends_is_replaced_and_its_counts_stay(gateway: Server) -> None:
    for _ in range(9):
        ask(gateway.url, "POST", "/v1/completions", BODY)
    wait_for(lambda: answered(gateway) == 9, "all are counted")
    old = workers(gateway)
    old[0].kill()
    wait_for(lambda: len(workers(gateway)) == 3 and old[0] not in workers(gateway), "a new one")
    for _ in range(9):  # whichever worker's connections they are, they wait for it
        assert ask(gateway.url, "POST", "/v1/completions", BODY).status == 200
    wait_for(lambda: answered(gateway) == 18, "what the killed one counted is there, too")


def test_a_new_worker_has_the_configuration_of_the_one_before(tmp_path: Path) -> None:
    """Not the one that the gateway began with, whose keys may be revoked by now; also where the
    file is bad meanwhile, and where it is to be read again while the worker starts."""
    names = {"old": "o" * 43, "new": "n" * 43}
    entries = [{"name": name, "sha256": digest(key)} for name, key in names.items()]
    with standin() as upstream:
        models = [{"name": "m", "replicas": [upstream.url]}]
        config = {"models": models, "keys": entries[:1]}
        with configured(tmp_path, config, GATEWAY_WORKERS="2") as gateway:
            file = tmp_path / "gateway.yaml"
            text = file.read_text()

            def statuses(name: str) -> set[int]:
                key = f"Bearer {names[name]}"
                answers = [
                    ask(gateway.url, "POST", "/v1/completions", BODY, authorization=key)
                    for _ in range(16)  # each on a connection of its own
                ]
                return {answer.status for answer in answers}

            def replace_worker() -> None:
                old = workers(gateway)[0]
                old.kill()
                wait_for(lambda: old not in workers(gateway), "it is gone")
                wait_for(lambda: len(workers(gateway)) == 2, "there is a new one")
                os.kill(gateway.pid, signal.SIGHUP)

            assert statuses("old") == {200}
            file.write_text(text.replace(entries[0]["sha256"], entries[1]["sha256"]))
            wait_for(lambda: statuses("old") == {401}, "the key is revoked")
            file.write_text("models: [")
            replace_worker()
            assert statuses("old") == {401} and statuses("new") == {200}
            file.write_text(text)
            replace_worker()
            wait_for(lambda: statuses("old") == {200}, "what has changed meanwhile is read")


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_all_end_together(gateway: Server, how: signal.Signals) -> None:
    running = [psutil.Process(gateway.pid), *psutil.Process(gateway.pid).children()]
    os.kill(gateway.pid, how)
    gone, left = psutil.wait_procs(running[1:], timeout=60)
    assert not left and len(gone) >= 3


def test_a_port_in_use_is_said(gateway: Server) -> None:
    port = gateway.url.rpartition(":")[2]
    for count, host, why in (
        (1, "127.0.0.1", "Address already in use"),
        (2, "127.0.0.1", "Address already in use"),
        (1, "no.such.host.invalid", ""),  # in words that depend on the system
    ):
        env = {**os.environ, **COMMON_ENV, "GATEWAY_PORT": port, "GATEWAY_HOST": host}
        command = [sys.executable, "-m", "serving", f"--workers={count}"]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
        assert done.returncode == 2
        assert done.stderr.startswith(f"attnserve-gateway: cannot listen on {host}:{port}: {why}")
        assert done.stderr.count("\n") == 1


def die(_: socket.socket, __: Path) -> None:
    """Be killed at once, as a worker is that takes too much memory."""
    print("began", flush=True)
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_worker_that_is_killed_again_and_again_is_given_up() -> None:
    code = (
        "from attnserve import command; from serving import workers; from tests.serving import "
        "test_workers; workers.BACKOFF_SECONDS = 0.1\n"
        f"workers.run_workers(1, '127.0.0.1', {free_port()}, test_workers.die)"
    )
    env = {**os.environ, **COMMON_ENV}
    began = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 1 and done.stdout.count("began") == MAX_YOUNG_DEATHS
    last = done.stderr.strip().splitlines()[-1]
    assert f"a worker of the gateway was killed {MAX_YOUNG_DEATHS} times as it began" in last
    assert time.monotonic() > began + sum(0.1 * 2**n for n in range(MAX_YOUNG_DEATHS - 1))


def test_the_wait_for_a_worker_doubles() -> None:
    assert [backoff(deaths) for deaths in range(8)] == [0, 0.5, 1, 2, 4, 8, 8, 8]


def test_pages_add_up(tmp_path: Path) -> None:
    def page_of(name: str, requests: int, in_flight: int) -> MetricsPages:
        registry = CollectorRegistry()
        Counter("attnserve_x", "Text.", ["route"], registry=registry).labels("/a").inc(requests)
        flying = Gauge("attnserve_requests_in_flight", "Text.", registry=registry)
        flying.set(in_flight)
        Gauge("attnserve_replica_healthy", "Text.", registry=registry).set(in_flight)
        pages = MetricsPages(tmp_path / name, registry)
        pages.write()
        return pages

    first = page_of("0.prom", 3, 1)
    page_of("1.prom", 4, 2)
    page_of("1.prom", 5, 0)  # in place of the one before
    lines = first.page().decode().splitlines()
    assert 'attnserve_x_total{route="/a"} 12.0' in lines
    assert "attnserve_requests_in_flight 1.0" in lines
    assert "attnserve_replica_healthy 1.0" in lines  # of the worker that was asked


def test_the_gateways_own_page_survives_the_way_through_text(tmp_path: Path) -> None:
    metrics = Metrics()
    metrics.ttft.labels("m", "softpick", "4").observe(0.3)
    metrics.requests.labels("/v1/completions", "m\n\"'\\", "", "", "200").inc()
    pages = MetricsPages(tmp_path / "0.prom", metrics.registry)
    alone = pages.page().decode()
    again = MetricsPages(tmp_path / "0.prom", metrics.registry).page().decode()

    def value(page: str, start: str) -> list[float]:
        return [float(x.rpartition(" ")[2]) for x in page.splitlines() if x.startswith(start)]

    for start in ("attnserve_time_to_first_token_seconds", "attnserve_requests_total"):
        assert value(alone, start) and value(again, start) == [2 * v for v in value(alone, start)]
