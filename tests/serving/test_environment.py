"""The gateway's settings: what is wrong is said in one line, with an exit code."""

import os
import subprocess
import sys

import pytest
from pydantic import ValidationError

from serving.config import Settings, Timeouts, one_line


@pytest.mark.parametrize(
    ("variable", "value"),
    [
        ("GATEWAY_PORT", "http"),
        ("GATEWAY_PORT", "0"),
        ("GATEWAY_PORT", "65536"),
        ("GATEWAY_HOST", ""),
        ("UPSTREAM_URL", "127.0.0.1:8000"),
        ("UPSTREAM_URL", "ftp://127.0.0.1"),
        ("UPSTREAM_URL", "http://127.0.0.1:8000?x=1"),
        ("UPSTREAM_URL", "http://127.0.0.1:port"),
        ("UPSTREAM_URL", "http://127.0.0.1:8000/v1/completions"),
        ("UPSTREAM_READ_SECONDS", "-1"),
        ("GATEWAY_MAX_BODY_BYTES", "nan"),
    ],
)
def test_nonsense_is_refused_in_one_line(
    monkeypatch: pytest.MonkeyPatch, variable: str, value: str
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValidationError) as caught:
        Settings()
    line = one_line(caught.value)
    assert line.startswith(f"{variable}={value!r}: ")
    assert "\n" not in line


@pytest.mark.parametrize("end", ["", "/", "/v1", "/v1/"])
def test_upstream_url_loses_its_v1(monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    monkeypatch.setenv("UPSTREAM_URL", f"http://localhost:9{end}")
    assert Settings().upstream_url == "http://localhost:9"


def test_former_names_still_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("UPSTREAM_SILENCE_SECONDS", "7")
    assert Settings().config().timeouts.read == 7.0
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
    assert result.stderr.startswith("attnserve-gateway: GATEWAY_PORT='http': ")


def test_help_names_every_variable() -> None:
    text = run_gateway("--help").stdout
    for field in Settings.model_fields.values():
        assert f"{field.alias}={field.default}" in text
        assert field.description
