"""The gateway's settings: what is wrong is said in one line, with an exit code."""

import os
import subprocess
import sys
from typing import Any

import pytest

from serving.config import Config, ConfigError, ModelEntry, Timeouts
from serving.config_file import ENVIRONMENT, from_environment


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GATEWAY_PORT", "http"),
        ("GATEWAY_PORT", "0"),
        ("GATEWAY_PORT", "65536"),
        ("GATEWAY_HOST", ""),
        ("GATEWAY_ALLOWED_HOSTS", "gw.example.com,https://x"),
        ("UPSTREAM_URL", "127.0.0.1:8000"),
        ("UPSTREAM_URL", "ftp://127.0.0.1"),
        ("UPSTREAM_URL", "http://127.0.0.1:8000?x=1"),
        ("UPSTREAM_URL", "http://127.0.0.1:port"),
        ("UPSTREAM_URL", "http://127.0.0.1:8000/v1/completions"),
        ("UPSTREAM_READ_SECONDS", "-1"),
        ("GATEWAY_MAX_BODY_BYTES", "nan"),
    ],
)
def test_nonsense_is_refused_in_one_line(variable: str, value: str) -> None:
    with pytest.raises(ConfigError) as caught:
        from_environment({variable: value})
    line = str(caught.value)
    shown = f"={value}" if value in ("0", "65536", "-1") else ""  # anything else may be secret
    assert line.startswith(f"{variable}{shown}: ")
    assert "\n" not in line


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_upstream_url_loses_its_v1(end: str) -> None:
    (model,) = from_environment({"UPSTREAM_URL": f"http://localhost:9{end}"}).models
    assert model.replicas == ("http://localhost:9",)


def test_every_variable_sets_something() -> None:
    default = from_environment({})
    assert default == Config(
        models=(ModelEntry(name="*", replicas=("http://127.0.0.1:8000",)),),
        timeouts=Timeouts(drain=10),
    )
    for variable in ENVIRONMENT:
        value = "http://x" if variable == "UPSTREAM_URL" else "7"
        assert from_environment({variable: value}) != default


def test_allowed_hosts() -> None:
    found = from_environment({"GATEWAY_ALLOWED_HOSTS": "a.example, *.b.example"})
    assert found.allowed_hosts == ("a.example", "*.b.example")


def test_former_names_still_work() -> None:
    assert from_environment({"UPSTREAM_SILENCE_SECONDS": "7"}).timeouts.read == 7.0
    assert Timeouts.model_validate({"silence": 8}).read == 8.0


def run_gateway(*args: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Run the command itself, for cases in which it ends at once."""
    return subprocess.run(
        [sys.executable, "-m", "serving", *args],
        env={**os.environ, **env},
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_command_refuses_nonsense() -> None:
    result = run_gateway(GATEWAY_PORT="http")
    assert result.returncode != 0
    assert result.stderr.count("\n") == 1
    assert result.stderr.startswith("attnserve-gateway: GATEWAY_PORT: ")


def test_help_names_every_variable_with_its_default() -> None:
    text = run_gateway("--help").stdout
    default = from_environment({})
    for variable, place in ENVIRONMENT.items():
        value: Any = default
        for name in place.split("."):
            value = value[int(name)] if name.isdigit() else getattr(value, name)
        value = " ".join(value) if isinstance(value, tuple) else value
        assert f"{variable}={value} " in text or variable == "UPSTREAM_SILENCE_SECONDS"
