"""Clients of the gateway, and the gateway itself as a process."""

import http.client
import json
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from serving.app import COUNTED_AFTER_SECONDS
from serving.config import Config
from serving.run import make_server
from serving.state import GatewayState
from tests.servers import Server, end_group, free_port, spawn, wait_until_healthy
from tests.serving.standin import wait_for

MODEL = "tiny"
"""The name under which the upstream of these tests serves its model."""


@contextmanager
def gateway_server(upstream_url: str, log_folder: Path, **env: str) -> Iterator[Server]:
    """`python -m serving` in front of `upstream_url`, up but not necessarily healthy."""
    port = free_port()
    url = f"http://127.0.0.1:{port}"
    log_file = log_folder / f"gateway-{port}.log"
    settings = {"UPSTREAM_URL": upstream_url, "GATEWAY_PORT": str(port), **env}
    process = spawn([sys.executable, "-m", "serving"], log_file, settings)
    try:
        wait_until_healthy(url, process, log_file, timeout=60, path="/metrics")
        yield Server(url, process.pid, log_file)
    finally:
        end_group(process)


FAST = {"every": 0.05, "timeout": 10.0, "failures": 2}
"""Health checks for tests, which do not wait for seconds; a late answer is no bad one."""


class Running:
    """A gateway in a thread of this process, behind a real uvicorn; `state` is its state."""

    def __init__(self, **config: Any) -> None:
        port = free_port()
        self.url = f"http://127.0.0.1:{port}"
        self.state = GatewayState(Config.model_validate({"health": FAST, **config, "port": port}))
        self.server = make_server(self.state)
        self.server.config.timeout_graceful_shutdown = 1
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        while not self.server.started or any(
            r.healthy is None for r in self.state.replicas.values()
        ):
            assert self.thread.is_alive(), "the gateway did not start"
            time.sleep(0.005)

    def apply(self, **config: Any) -> None:
        """Use another configuration, as a changed file would."""
        new = Config.model_validate({"health": FAST, **config, "port": self.state.config.port})
        loop = self.server.servers[0].get_loop()
        loop.call_soon_threadsafe(self.state.apply, new)
        wait_for(lambda: self.state.config is new, "the configuration is used")

    def metric(self, start: str) -> float:
        """Return the sum of the lines of /metrics that start like this."""
        return metric(self.url, start)


@contextmanager
def running(*upstreams: str, **config: Any) -> Iterator[Running]:
    """Yield a gateway for model "m" on `upstreams`, or for the `models` of `config`."""
    if upstreams:
        config["models"] = [{"name": "m", "variant": "v", "bits": 8, "replicas": list(upstreams)}]
    gateway = Running(**config)
    try:
        yield gateway
    finally:
        gateway.server.should_exit = True
        gateway.thread.join(10)


@contextmanager
def configured(folder: Path, config: dict[str, Any], **env: str) -> Iterator[Server]:
    """`python -m serving --config folder/gateway.yaml` in a process of its own."""
    port = free_port()
    file = folder / "gateway.yaml"
    file.write_text(yaml.safe_dump({**config, "port": port}))
    log_file = folder / f"gateway-{port}.log"
    process = spawn([sys.executable, "-m", "serving", "--config", str(file)], log_file, env)
    url = f"http://127.0.0.1:{port}"
    try:
        wait_until_healthy(url, process, log_file, timeout=60, path="/metrics")
        yield Server(url, process.pid, log_file)
    finally:
        end_group(process)


def open_request(
    url: str, body: Any, path: str = "/v1/completions", **headers: str
) -> http.client.HTTPConnection:
    """Send a request, and return its connection before it is answered."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(
        "POST", path, json.dumps(body), {"content-type": "application/json", **named}
    )
    return connection


def leave(connection: http.client.HTTPConnection) -> None:
    """Close the socket at once, as a killed client does."""
    assert connection.sock is not None
    connection.sock.close()
    connection.close()


def completion(url: str, timeout: float = 60, **fields: Any) -> dict[str, Any]:
    """One answer of /v1/completions that is not streamed."""
    body = {"model": MODEL, "prompt": "The license", "temperature": 0, **fields}
    request = urllib.request.Request(
        f"{url}/v1/completions",
        json.dumps(body).encode(),
        {"content-type": "application/json"},
    )
    with urllib.request.urlopen(request, timeout=timeout) as response:
        answer: dict[str, Any] = json.load(response)
        return answer


class HttpAnswer:
    """Status, headers and body of one request."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    def json(self) -> Any:
        """Return the body, parsed."""
        return json.loads(self.body)


def ask(url: str, method: str, path: str, body: Any = None, **headers: str) -> HttpAnswer:
    """One request on a connection of its own; a `body` that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, data, {"content-type": "application/json", **named})
    answer = HttpAnswer(connection.getresponse())
    connection.close()
    return answer


def metric(url: str, start: str, part: str = "") -> float:
    """Return the sum of the lines of /metrics that start like this and have `part` in them."""
    lines = ask(url, "GET", "/metrics").body.decode().splitlines()
    found = [line for line in lines if line.startswith(start) and part in line]
    return sum(float(line.rsplit(" ", 1)[1]) for line in found)


def error_of(answer: HttpAnswer) -> dict[str, Any]:
    """Return the error of an answer, after a check of its shape."""
    assert answer.headers["content-type"] == "application/json"
    body = answer.json()
    assert set(body) == {"error"}
    error: dict[str, Any] = body["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert isinstance(error["message"], str) and error["message"]
    assert isinstance(error["type"], str)
    assert error["param"] is None or isinstance(error["param"], str)
    assert error["code"] is None or isinstance(error["code"], str)
    return error


def request_lines(capsys: pytest.CaptureFixture[str]) -> list[dict[str, Any]]:
    """Return what has been logged of requests since the last call, once it surely has been."""
    time.sleep(5 * COUNTED_AFTER_SECONDS)
    lines = (json.loads(line) for line in capsys.readouterr().err.splitlines() if line[:1] == "{")
    return [line for line in lines if line["message"] == "request"]
