"""The YAML configuration: what is wrong with it is said in one line, and what is right is used."""

import asyncio
import http.client
import json
import math
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml

from serving.auth import digest
from serving.config import Config, ConfigError, Section
from serving.config_file import load
from serving.state import GatewayState
from tests.servers import Server
from tests.serving.helpers import HttpAnswer, ask, configured, error_of, metric, open_request
from tests.serving.standin import standin, wait_for

GOOD: dict[str, Any] = {"models": [{"name": "m", "replicas": ["http://127.0.0.1:1"]}]}

KEY = {"name": "a", "sha256": digest("a")}


def write(folder: Path, text: str | dict[str, Any]) -> Path:
    """Write a configuration's file."""
    file = folder / "gateway.yaml"
    file.write_text(text if isinstance(text, str) else yaml.safe_dump(text))
    return file


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("models: [", "line 1, column 10"),
        ("- a", "must have `models:` at its top"),
        ("", "must have `models:` at its top"),
        ("models: []", "models: must not be empty"),
        ("\x00", "special characters are not allowed"),
        ("[" * 1000, "maximum recursion depth exceeded"),
        ("models: x\nmodels: y", "line 2, column 1: models stands here twice"),
        ({**GOOD, "modles": 1}, "modles: there is no such setting here"),
        ({**GOOD, "limits": {"queue_size": -1}}, "limits.queue_size=-1: "),
        ({**GOOD, "port": 65536}, "port=65536: "),
        ({"models": [*GOOD["models"], *GOOD["models"]]}, "models has m twice"),
        ({"models": [{"name": "m"}]}, "models.0.replicas: is missing"),
        ({"models": [{"name": "m", "replicas": ["ftp://x"]}]}, "must be an address like"),
        ({"models": [{"name": "m", "replicas": ["http://u:p@x"]}]}, "must be an address like"),
        *(
            ({"models": [{"name": "m", "replicas": [url]}]}, "must be an address like")
            for url in (
                f"http://{'a' * 70}.example",
                "http://a b:8000",
                "http://a\tb",
                " http://a",
                "http://a..b",
                "http://a/\n",
                "http://a%20b",
                "http://[::1",
                "http://a:99999",
                "http://:80",
            )
        ),
        (
            {"models": [{"name": "m", "replicas": ["http://x/v2"]}]},
            "after /v1, not with another path",
        ),
        (
            {"models": [{"name": "m", "replicas": ["http://x", "http://x/v1"]}]},
            "the same address twice",
        ),
        ({"models": [{**GOOD["models"][0], "api_key_env": "NO_SUCH"}]}, "no such variable"),
        ({"models": [{**GOOD["models"][0], "api_key_env": "HOME"}]}, "api_key_env needs keys"),
        ({**GOOD, "keys": []}, "keys is empty; `open: true` lets every client in"),
        ({**GOOD, "protect_metrics": True}, "protect_metrics needs keys"),
        ({**GOOD, "open": True, "keys": [KEY]}, "open: true and keys contradict each other"),
        ({**GOOD, "keys": [{**KEY, "cost_per_day": 1}]}, "cost_per_day of a needs a price"),
        ({**GOOD, "keys": [KEY, {**KEY, "name": "b"}]}, "keys has the key of a twice"),
        ({**GOOD, "cors_origins": ["https://x/y"]}, "must be an origin like"),
        ({**GOOD, "allowed_hosts": "gw.example.com"}, "allowed_hosts: must be a list"),
        *(
            ({**GOOD, "allowed_hosts": ["gw", "*.corp", "[::1]", host]}, "allowed_hosts.3: must be")
            for host in ("https://gw.example.com", "gw.example.com:8080", "*corp", "a.*", "a.", "")
        ),
        ({**GOOD, "timeouts": 5}, "timeouts: must be settings"),
        ({**GOOD, "breaker": {"open_seconds": math.inf}}, "breaker.open_seconds: "),
        ({**GOOD, "keys": [{**KEY, "sha256": "A"}]}, "keys.0.sha256: "),
    ],
)
def test_nonsense_is_refused_in_one_line(
    tmp_path: Path, text: str | dict[str, Any], said: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    line = str(caught.value)
    assert said in line and str(tmp_path) in line
    assert "\n" not in line
    assert ("empty" in line) == ("empty" in said)  # what follows from an error is none


SECRET = "attnserve-xz1UguVTMHczI3aT4mOS-yAORc05JOu5OTy-OFSzUa0"  # made by `attnserve keys new`
MODEL: dict[str, Any] = GOOD["models"][0]


@pytest.mark.parametrize(
    "text",
    [
        {**GOOD, "keys": [{"name": "a", "sha256": SECRET}]},
        {**GOOD, "keys": [{"name": SECRET, "sha256": digest(SECRET)}]},
        {**GOOD, "keys": [{"name": digest(SECRET), "sha256": digest(SECRET)}]},
        {**GOOD, "keys": [{"name": "a", "sha256": digest(SECRET)}] * 2},
        {**GOOD, "keys": [{"name": n, "sha256": digest(SECRET)} for n in "ab"]},
        {**GOOD, "keys": [{"name": "a", "key": SECRET, "sha256": digest("a")}]},
        {**GOOD, "keys": [SECRET]},
        {**GOOD, "keys": SECRET},
        {**GOOD, "keys": {SECRET: "alice"}},
        {**GOOD, "api_key": SECRET},
        {**GOOD, SECRET: 1},
        {**GOOD, "port": SECRET},
        {**GOOD, "redis": SECRET},
        {**GOOD, "redis": f"http://:{SECRET}@x"},
        {**GOOD, "redis": f"redis://x:{SECRET}"},
        {**GOOD, "redis": f"redis://:{SECRET}@x", "port": 0},
        {**GOOD, "logging": {"level": SECRET}},
        {"models": [{**MODEL, "api_key_env": SECRET}]},
        *({"models": [{**MODEL, "replicas": [url]}]} for url in (
            f"http://user:{SECRET}@x",
            f"http://x:{SECRET}",
            f"http://x/{SECRET}",
            f"http://[{SECRET}]",
            f"http://\u2100{SECRET}@x",
            f"http://x?key={SECRET}",
        )),
        f"a: *{SECRET}",
        f"a: !{SECRET} b",
        f"a: !!int {SECRET}",
        f"{SECRET}: 1\n{SECRET}: 2",
        f'a: "{SECRET}\\{SECRET}"',
        f"%{SECRET}",
    ],
)  # fmt: skip
def test_no_error_repeats_a_secret(tmp_path: Path, text: str | dict[str, Any]) -> None:
    """Wherever in the file it stands; nor its hash."""
    with pytest.raises(ConfigError) as caught:
        load(write(tmp_path, text))
    line = str(caught.value)
    assert SECRET not in line and SECRET.lower() not in line and digest(SECRET) not in line


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read .*: No such file"):
        load(tmp_path / "none.yaml")


def test_example_in_the_docs_is_good(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = (Path(__file__).parents[2] / "docs/GATEWAY.md").read_text()
    example = text.split("```yaml\n")[1].split("```")[0]
    monkeypatch.setenv("VLLM_API_KEY", "secret")
    config = load(write(tmp_path, example))
    assert len(config.models) >= 2 and config.keys


EXAMPLE = ("host", "port", "models", "keys", "playground", "shadow")
"""Settings that the docs show in their example, with comments."""


def test_docs_name_every_setting_and_its_default() -> None:
    text = (Path(__file__).parents[2] / "docs/GATEWAY.md").read_text()
    for section in ("limits", "timeouts", "health", "breaker", "routing", "logging"):
        part = getattr(Config.model_validate(GOOD), section)
        for name, field in type(part).model_fields.items():
            assert field.description, f"{section}.{name} has no docstring"
            default = "none" if field.default is None else f"{field.default}".lower()
            assert f"`{section}.{name}` | {default} |" in text
    for name, field in Config.model_fields.items():
        if isinstance(field.default, Section) or name in EXAMPLE:
            continue
        assert field.description, f"{name} has no docstring"
        default = f"{field.default or 'none'}".lower() if field.default is not False else "false"
        assert f"| `{name}` | {default} | {' '.join(field.description.split())} |" in text


def run_gateway(*args: str) -> subprocess.CompletedProcess[str]:
    """Run the command itself, for cases in which it ends at once."""
    command = [sys.executable, "-m", "serving", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=60)


def test_check_config(tmp_path: Path) -> None:
    checked = ("--config", str(write(tmp_path, GOOD)), "--check-config")
    good = run_gateway(*checked)
    assert good.returncode == 0
    assert good.stdout.splitlines()[-1].endswith("is good: models 1, keys 0")
    assert json.loads(run_gateway(*checked, "--json").stdout)["models"] == 1
    bad = run_gateway("--config", str(write(tmp_path, "models: []")), "--check-config")
    assert bad.returncode == 2
    assert bad.stderr.startswith("attnserve-gateway: ") and bad.stderr.count("\n") == 1


def test_keys_new() -> None:
    made = json.loads(run_gateway("keys", "new", "alice", "--json").stdout)
    assert made["name"] == "alice"
    assert made["sha256"] == digest(made["key"])
    assert run_gateway("keys", "new", "two words").returncode == 2


def models(gateway: Server) -> list[str]:
    """Return the ids of /v1/models."""
    return [entry["id"] for entry in ask(gateway.url, "GET", "/v1/models").json()["data"]]


def test_streams_go_on_while_a_configuration_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With thousands of keys, that takes a second."""
    state = GatewayState(load(write(tmp_path, GOOD)), tmp_path / "gateway.yaml")
    ticks = 0

    def slowly(path: Path) -> Config:
        nonlocal ticks
        ticks = 0
        time.sleep(0.5)
        assert ticks > 10
        return load(path)

    async def tick() -> None:
        nonlocal ticks
        while True:
            await asyncio.sleep(0.01)
            ticks += 1

    async def reload() -> None:
        before = state.config
        ticking = asyncio.create_task(tick())
        await state.reload()
        ticking.cancel()
        assert state.config is not before

    monkeypatch.setattr("serving.state.load", slowly)
    asyncio.run(reload())


def test_reload(tmp_path: Path) -> None:
    """By change of the file and by SIGHUP; bad ones are refused; nothing that runs is disturbed."""
    with standin("a", "b") as upstream:

        def config(*names: str) -> dict[str, Any]:
            return {"models": [{"name": n, "replicas": [upstream.url]} for n in names]}

        with configured(tmp_path, config("a")) as gateway:
            file = tmp_path / "gateway.yaml"
            port = yaml.safe_load(file.read_text())["port"]
            upstream.between_s = 0.1
            body = {"model": "a", "prompt": "x", "max_tokens": 40, "stream": True}
            stream = open_request(gateway.url, body).getresponse()
            assert stream.readline()

            file.write_text(yaml.safe_dump({**config("a", "b"), "port": port}))
            wait_for(lambda: models(gateway) == ["a", "b"], "the new file is used")

            file.write_text("models: [")
            wait_for(lambda: "configuration refused" in gateway.log(), "the bad file is refused")
            (line,) = (x for x in gateway.log().splitlines() if "configuration refused" in x)
            assert "line 1, column 10" in json.loads(line)["message"]
            assert models(gateway) == ["a", "b"]

            stat = file.stat()
            text = yaml.safe_dump({**config("b"), "port": port})
            file.write_text(text)
            # Not seen by the clock: the time of the bad file again, as coarse clocks may have it.
            os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
            os.kill(gateway.pid, signal.SIGHUP)
            wait_for(lambda: models(gateway) == ["b"], "SIGHUP reads the file")
            assert stream.read().endswith(b"data: [DONE]\n\n")  # of a model that has gone
            metrics = ask(gateway.url, "GET", "/metrics").body.decode()
            assert 'attnserve_config_reloads_total{result="refused"} 1.0' in metrics


def test_port_needs_a_restart(tmp_path: Path) -> None:
    with configured(tmp_path, GOOD) as gateway:
        write(tmp_path, {**GOOD, "port": 1})
        wait_for(lambda: "a changed port needs a restart" in gateway.log(), "it says so")


def refuses(gateway: Server) -> bool:
    """Whether it takes no connections."""
    try:
        ask(gateway.url, "GET", "/health")
    except ConnectionError:
        return True
    return False


def test_shutdown_finishes_streams_and_refuses_new_ones(tmp_path: Path) -> None:
    with standin() as upstream:
        upstream.between_s = 0.1
        config = {"models": [{"name": "m", "replicas": [upstream.url]}]}
        with configured(tmp_path, config) as gateway:
            body = {"model": "m", "prompt": "x", "max_tokens": 50, "stream": True}
            stream = open_request(gateway.url, body).getresponse()
            assert stream.readline()
            os.kill(gateway.pid, signal.SIGTERM)
            wait_for(lambda: refuses(gateway), "nothing listens")
            assert upstream.running == 1
            assert stream.read().endswith(b"data: [DONE]\n\n")
            wait_for(lambda: upstream.finished == 1, "the upstream has noticed its end")
            assert "Traceback" not in gateway.log()


def test_shutdown_cuts_what_takes_longer_than_drain(tmp_path: Path) -> None:
    with standin() as upstream:
        upstream.between_s = 0.1
        config = {
            "models": [{"name": "m", "replicas": [upstream.url]}],
            "timeouts": {"drain": 1},
        }
        with configured(tmp_path, config) as gateway:
            body = {"model": "m", "prompt": "x", "max_tokens": 1000, "stream": True}
            stream = open_request(gateway.url, body).getresponse()
            os.kill(gateway.pid, signal.SIGTERM)
            last = stream.read().strip().split(b"\n\n")[-1]
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "shutting_down"
            wait_for(lambda: upstream.aborted == 1, "the upstream is freed")
            assert "Traceback" not in gateway.log()


def test_shutdown_answers_what_waits_for_a_list_of_models(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"http://127.0.0.1:{silent.getsockname()[1]}"
        config = {
            "models": [{"name": "m", "replicas": [url]}],
            "timeouts": {"drain": 1},
            "health": {"timeout": 60},
        }
        with configured(tmp_path, config) as gateway:
            waiting = http.client.HTTPConnection(urlsplit(gateway.url).netloc, timeout=60)
            waiting.request("GET", "/v1/models")
            wait_for(lambda: metric(gateway.url, "attnserve_requests_in_flight") > 1, "it waits")
            os.kill(gateway.pid, signal.SIGTERM)
            answer = HttpAnswer(waiting.getresponse())
            assert (answer.status, error_of(answer)["code"]) == (503, "shutting_down")
            assert "Traceback" not in gateway.log()
