"""`python -m benchmarks`: the standard set is made of commands that exist. A run is slow."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from typing import Any

import pytest
from typer.main import get_command

from attnserve.command import add, application
from benchmarks.__main__ import PACK, STANDARD, benchmarks
from benchmarks.gateway.__main__ import gateway
from benchmarks.kernels.__main__ import kernels
from benchmarks.memory.__main__ import memory
from benchmarks.serve.__main__ import serve
from quant import quantize
from tests.conftest import Commands


def test_every_command_is_understood() -> None:
    functions: dict[str, Callable[..., Any]] = {
        "benchmarks.kernels": kernels,
        "benchmarks.memory": memory,
        "benchmarks.serve": serve,
        "benchmarks.gateway": gateway,
    }
    assert PACK[0] == quantize.__name__
    assert {command[0] for command in STANDARD.values()} == set(functions)
    for module, *arguments in STANDARD.values():
        app = application()
        add(app, module, functions[module])
        parsed = get_command(app).make_context(module, [*arguments, "--no-save"]).params
        assert parsed["no_save"]


def test_unknown_parts_are_refused(commands: Commands) -> None:
    assert "'--only'" in commands.refused(benchmarks, "--only", "nothing")


@pytest.mark.slow
def test_a_part() -> None:
    command = [sys.executable, "-m", "benchmarks", "--only", "kernels", "--no-save", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout)
    assert [row["benchmark"] for row in last["rows"]] == ["kernels"]
    assert "of limit" in done.stderr
