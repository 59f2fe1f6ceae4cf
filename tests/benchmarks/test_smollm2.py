"""`python -m benchmarks.smollm2`: what it refuses. What it writes, tests/docs runs."""

from __future__ import annotations

from pathlib import Path

from benchmarks.smollm2 import smollm2
from tests.conftest import Commands
from tests.tiny import LICENSE


def test_what_is_no_gguf_file_is_refused(tmp_path: Path, commands: Commands) -> None:
    for file in (LICENSE, tmp_path / "nowhere.gguf", tmp_path):
        line = commands.refused(smollm2, tmp_path / "out", "--gguf", file)
        assert f"{file} is not a GGUF file" in line
    assert not (tmp_path / "out").exists()
