"""Clients of the gateway, and the gateway itself as a process."""

import http.client
import json
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from tests.servers import Server, end_group, free_port, spawn, wait_until_healthy

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


class Answer:
    """Status, headers and body of one request."""

    def __init__(self, response: http.client.HTTPResponse) -> None:
        self.status = response.status
        self.headers = response.headers
        self.body = response.read()

    def json(self) -> Any:
        """The body, parsed."""
        return json.loads(self.body)


def ask(url: str, method: str, path: str, body: Any = None, **headers: str) -> Answer:
    """One request on a connection of its own; a `body` that is not bytes is sent as JSON."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    data = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    connection.request(method, path, data, {"content-type": "application/json", **named})
    answer = Answer(connection.getresponse())
    connection.close()
    return answer


def error_of(answer: Answer) -> dict[str, Any]:
    """The error of an answer, after a check of its shape."""
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
