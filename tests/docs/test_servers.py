"""The servers that the texts tell people to start, and what they are told to ask them."""

from __future__ import annotations

import json
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.docs.clone import Clone
from tests.docs.rules import Asked, Serve
from tests.docs.table import RULES
from tests.docs.text import Block, all_blocks
from tests.servers import end_group, free_port, wait_until_healthy

pytestmark = pytest.mark.integration

GATEWAY, VLLM = "127.0.0.1:8080", "127.0.0.1:8000"
"""The addresses in the texts."""


class Served:
    """A started command: its own two ports, and its output."""

    def __init__(self, clone: Clone, rule: Serve, log_file: Path) -> None:
        self.ports = {"vllm": free_port(), "gateway": free_port()}
        self.clone, self.log_file = clone, log_file
        self.command = rule.command.format(**self.ports)
        own = "gateway" if "gateway" in rule.command else "vllm"
        self.url = f"http://127.0.0.1:{self.ports[own]}"
        self.seconds = 0.0
        """From the start until it answered."""

    def here(self, typed: str) -> str:
        """Return a command or program of the texts with the ports of this server."""
        for address, name in ((GATEWAY, "gateway"), (VLLM, "vllm")):
            typed = typed.replace(address, f"127.0.0.1:{self.ports[name]}")
        return typed

    def run(self, typed: str) -> subprocess.CompletedProcess[str]:
        """Type a command of the texts in the clone."""
        return self.clone.run(self.here(typed), timeout=300)


@contextmanager
def serving(clone: Clone, rule: Serve, log_file: Path) -> Iterator[Served]:
    """Start a command in the clone; ready when it answers, stopped in the end."""
    served = Served(clone, rule, log_file)
    if rule.setup:
        done = clone.run(rule.setup.format(**served.ports))
        assert done.returncode == 0, done.stdout[-3000:]
    began = time.monotonic()
    with log_file.open("wb") as log:
        process = subprocess.Popen(
            ["bash", "-c", f"exec {served.command}"],
            cwd=clone.root,
            env=clone.environment(),
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        wait_until_healthy(served.url, process, log_file, path=rule.path)
        served.seconds = time.monotonic() - began
        yield served
    finally:
        process.send_signal(signal.SIGTERM)  # it ends what it has started in other groups
        end_group(process, grace=90)


def answer(url: str) -> str:
    """Return the text that the server's first model writes."""
    with urllib.request.urlopen(f"{url}/v1/models", timeout=60) as response:
        model = json.load(response)["data"][0]["id"]
    body = {"model": model, "prompt": [5, 6, 7, 8], "max_tokens": 8, "ignore_eos": True}
    request = urllib.request.Request(
        f"{url}/v1/completions", json.dumps(body).encode(), {"content-type": "application/json"}
    )
    with urllib.request.urlopen(request, timeout=300) as response:
        choice = json.load(response)["choices"][0]
    assert choice["finish_reason"] == "length"
    return str(choice["text"])


def cases() -> list[object]:
    """Return the servers of the texts but the first, which has a test of its own."""
    return [
        pytest.param(command, rule, id=command, marks=[pytest.mark.slow] if rule.slow else [])
        for command, rule in RULES.items()
        if isinstance(rule, Serve) and command != "make serve"
    ]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize(("command", "rule"), cases())
def test_server(
    command: str,
    rule: Serve,
    clone: Clone,
    tmp_path: Path,
    record_property: Callable[[str, object], None],
) -> None:
    record_property("command", command)
    with serving(clone, rule, tmp_path / "log") as served:
        record_property("seconds", served.seconds)
        if rule.path == "/v1/models":
            assert answer(served.url)


@pytest.fixture(scope="module")
def make_serve(clone: Clone, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`make serve` as the README has it, but for the ports."""
    rule = RULES["make serve"]
    assert isinstance(rule, Serve)
    with serving(clone, rule, tmp_path_factory.mktemp("serve") / "log") as served:
        yield served


@pytest.mark.timeout(1800)
def test_make_serve(make_serve: Served, record_property: Callable[[str, object], None]) -> None:
    record_property("command", make_serve.command)
    record_property("seconds", make_serve.seconds)
    assert answer(make_serve.url)
    for _ in range(600):  # the gateway answers a moment before the launcher says so
        printed = make_serve.log_file.read_text()
        if lines := re.findall(r"^curl .*}'$", printed, re.M):
            break
        time.sleep(0.1)
    assert "Traceback" not in printed
    (curl,) = lines
    assert '"text"' in make_serve.run(curl).stdout


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("command", [x for x, rule in RULES.items() if isinstance(rule, Asked)])
def test_asked(
    command: str, make_serve: Served, record_property: Callable[[str, object], None]
) -> None:
    record_property("command", command)
    done = make_serve.run(command)
    assert done.returncode == 0, done.stdout
    assert '"error"' not in done.stdout
    assert re.search(r'"(text|content|id|status)"|^(attnserve_|# HELP)', done.stdout, re.M)


def client_programs() -> list[Block]:
    """Return the Python programs of the texts that ask a server."""
    return [block for block in all_blocks("python") if GATEWAY in block.content]


@pytest.mark.timeout(1800)
@pytest.mark.parametrize("block", client_programs(), ids=lambda block: str(block.text))
def test_client_program(
    block: Block, make_serve: Served, record_property: Callable[[str, object], None]
) -> None:
    record_property("command", f"{block.text}: {block.content.splitlines()[0]} ...")
    program = make_serve.clone.root / "client.py"
    program.write_text(make_serve.here(block.content), encoding="utf-8")
    done = make_serve.run("python client.py")
    assert done.returncode == 0, done.stdout[-3000:]
    assert done.stdout.strip(), "it printed nothing"
