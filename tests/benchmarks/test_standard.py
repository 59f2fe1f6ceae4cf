"""`python -m benchmarks`: the standard set is made of commands that exist. A run is slow."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from benchmarks import pruning
from benchmarks.__main__ import PACK, STANDARD, parse
from benchmarks.gateway import __main__ as gateway
from benchmarks.kernels import __main__ as kernels
from benchmarks.memory import __main__ as memory
from benchmarks.serve import __main__ as serve
from tests.quantized import quantize


def test_every_command_is_understood(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    parsers: dict[str, Callable[[list[str]], object]] = {
        "benchmarks.kernels": kernels.parser().parse_args,
        "benchmarks.memory": memory.parse,
        "benchmarks.serve": serve.parse,
        "benchmarks.pruning": pruning.parse,
        "benchmarks.gateway": gateway.parse,
    }
    assert PACK[0] == quantize.__name__
    quantize(PACK[1:])
    assert {command[0] for command in STANDARD.values()} == set(parsers)
    for module, *arguments in STANDARD.values():
        parsers[module]([*arguments, "--no-save"])


def test_parts() -> None:
    assert parse([]).only == list(STANDARD)
    assert parse(["--only", "serve", "memory"]).only == ["serve", "memory"]
    with pytest.raises(SystemExit):
        parse(["--only", "nothing"])


@pytest.mark.slow
def test_a_part() -> None:
    command = [sys.executable, "-m", "benchmarks", "--only", "kernels", "--no-save"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    assert [row["benchmark"] for row in last["rows"]] == ["kernels"]
    assert "of limit" in done.stdout
