"""benchmarks.gateway: real gateways, a small load, and what is written of it."""

import json
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.gateway.__main__ import (
    DIRECT,
    MODES,
    OURS,
    ROUTER,
    WORKERS,
    Gateway,
    find_router,
    gateway,
    rows_of,
)
from serving.launch.process import Service
from tests.conftest import Commands


def test_small_run(tmp_path: Path, commands: Commands) -> None:
    csv = tmp_path / "gateway.csv"
    csv.write_text("gateway,kept\nold,1.50\n")
    sizes = ["--requests=8", "--rounds=1", "--concurrency=2", "--tokens=4", "--pause-ms=1"]
    files = [f"--csv={csv}", f"--log-folder={tmp_path}"]
    found = json.loads(
        commands.run(gateway, "--gateways", OURS, WORKERS, ROUTER, *sizes, *files, "--json")
    )
    rows = {row["gateway"]: row for row in found["rows"]}
    assert set(rows) == {DIRECT, OURS, WORKERS, ROUTER}
    assert rows[OURS]["rss_mb"] > 10
    assert rows[OURS]["stream_ttft_ms_p50"] > 0 < rows[OURS]["spread_ttft_ms_p50"]
    if find_router() is None:
        assert rows[ROUTER]["note"] == "not installed"
    table = pd.read_csv(csv, dtype=str)
    assert list(table["gateway"]) == ["old", *rows]
    assert table["kept"][0] == "1.50"


def test_ratios_are_taken_round_by_round(tmp_path: Path) -> None:
    def made(name: str, cpu: list[float], times: list[float]) -> Gateway:
        modes = MODES
        service = None if name == DIRECT else Service(name, 1, tmp_path)
        cpus = dict.fromkeys(modes, cpu)
        return Gateway(name, "", service, cpu_ms=cpus, ttft_ms=dict.fromkeys(modes, times))

    direct = made(DIRECT, [], [1.0, 2.0, 3.0])
    ours = made(OURS, [1.0, 2.0, 4.0], [2.0, 3.0, 4.0])
    other = made("other", [3.0, 4.0, 4.0], [1.0, 2.0, 3.0])
    rows = {row["gateway"]: row for row in rows_of([direct, ours, other])}
    assert rows["other"]["stream_cpu_ratio"] == 2.0  # of 3, 2 and 1
    assert rows[OURS]["whole_ttft_added_ms_p50"] == pytest.approx(1.0)
    assert "stream_cpu_ms" not in rows[DIRECT]


@pytest.mark.parametrize(
    ("argument", "said"),
    [("--gateways=nginx", "'--gateways'"), ("--rounds=0", "'--rounds'")],
)
def test_bad_arguments(argument: str, said: str, commands: Commands) -> None:
    assert said in commands.refused(gateway, argument)
