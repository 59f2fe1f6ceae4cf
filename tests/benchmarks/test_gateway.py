"""benchmarks.gateway: real gateways, a small load, and what is written of it."""

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.gateway.__main__ import DIRECT, MODES, OURS, ROUTER, Peer, find_router, results
from serving.launch.process import Service
from tests.servers import free_port


def run(*args: str) -> subprocess.CompletedProcess[str]:
    """The command."""
    command = [sys.executable, "-m", "benchmarks.gateway", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


def test_small_run(tmp_path: Path) -> None:
    csv = tmp_path / "gateway.csv"
    csv.write_text("gateway,kept\nold,1.50\n")
    sizes = ["--requests=8", "--rounds=1", "--concurrency=2", "--tokens=4", "--pause-ms=1"]
    files = [f"--csv={csv}", f"--log-folder={tmp_path}", f"--port={free_port()}"]
    done = run("--gateways", OURS, ROUTER, *sizes, *files)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    rows = {row["gateway"]: row for row in last["rows"]}
    assert set(rows) == {DIRECT, OURS, ROUTER}
    assert rows[OURS]["rss_mb"] > 10
    assert rows[OURS]["stream_ttft_ms_p50"] > 0 < rows[OURS]["spread_ttft_ms_p50"]
    if find_router() is None:
        assert rows[ROUTER]["note"] == "not installed" in done.stdout
    table = pd.read_csv(csv, dtype=str)
    assert list(table["gateway"]) == ["old", *rows]
    assert table["kept"][0] == "1.50"


def test_ratios_are_taken_round_by_round(tmp_path: Path) -> None:
    def peer(name: str, cpu: list[float], times: list[float]) -> Peer:
        modes = MODES
        service = None if name == DIRECT else Service(name, 1, tmp_path)
        cpus = dict.fromkeys(modes, cpu)
        return Peer(name, "", service, cpu_ms=cpus, ttft_ms=dict.fromkeys(modes, times))

    direct = peer(DIRECT, [], [1.0, 2.0, 3.0])
    ours = peer(OURS, [1.0, 2.0, 4.0], [2.0, 3.0, 4.0])
    other = peer("other", [3.0, 4.0, 4.0], [1.0, 2.0, 3.0])
    rows = {row["gateway"]: row for row in results([direct, ours, other])}
    assert rows["other"]["stream_cpu_ratio"] == 2.0  # of 3, 2 and 1
    assert rows[OURS]["whole_ttft_added_ms_p50"] == pytest.approx(1.0)
    assert "stream_cpu_ms" not in rows[DIRECT]


@pytest.mark.parametrize(
    ("argument", "said"),
    [("--gateways=nginx", "invalid choice"), ("--rounds=0", "is not a whole number above 0")],
)
def test_bad_arguments(argument: str, said: str) -> None:
    done = run(argument)
    assert done.returncode == 2
    assert said in done.stderr.splitlines()[-1]
