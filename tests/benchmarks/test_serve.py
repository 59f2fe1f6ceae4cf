"""`python -m benchmarks.serve`: its cases, levels, statistics and refusals. A run of it is slow."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import typer

from benchmarks.__main__ import STANDARD, Benchmark
from benchmarks.checkpoints import CaseOptions, ServerCase, weight_bytes
from benchmarks.options import Dtype, ServerOptions
from benchmarks.serve.__main__ import serve, subjects_of
from benchmarks.serve.load import (
    LEVELS,
    Level,
    Load,
    LoadResult,
    Runs,
    Subject,
    level,
    read,
    together,
)
from benchmarks.serve.rows import capacity, plot, rows_of, table
from serving.launch.process import LaunchError
from tests.benchmarks.conftest import ours
from tests.conftest import Commands
from tests.tiny import write_tiny_llama

RECORDED = Path(__file__).with_name("data") / "vllm_bench_serve.json"
"""What `vllm bench serve` 0.32 wrote of sixteen requests to checkpoints/softmax, less texts."""


OPTIONS = ServerOptions(1, 1 << 20)


def cases(folder: Path, *packed: Path) -> list[ServerCase]:
    """Return those of both checkpoints, with budgets that fit them, and of packed ones."""
    ckpts = [folder / "softmax", folder / "selective"]
    return CaseOptions(ckpts, list(packed), [8, 4, 12]).cases()


def subjects(folder: Path) -> list[Subject]:
    """Return stock vLLM and those cases, without a gateway."""
    return subjects_of(cases(folder), OPTIONS, [], "none")


def test_figures_are_those_of_vllm() -> None:
    recorded, requests = json.loads(RECORDED.read_text()), read(RECORDED)
    for name in ("ttft", "tpot", "itl"):
        values = getattr(requests, name)
        assert np.median(values) == pytest.approx(recorded[f"median_{name}_ms"])
        assert np.percentile(values, 99) == pytest.approx(recorded[f"p99_{name}_ms"])
    assert requests.tokens / requests.seconds == pytest.approx(recorded["output_throughput"])
    limits = Level("recorded", 600, 1000)  # recorded with --goodput ttft:600 tpot:1000
    assert 0 < requests.good(limits) < len(requests.ttft)
    goodput = requests.good(limits) / requests.seconds
    assert goodput == pytest.approx(recorded["request_goodput"])


def test_failed_requests_are_no_measurement(tmp_path: Path) -> None:
    file = tmp_path / "result.json"
    recorded = json.loads(RECORDED.read_text()) | {"failed": 1}
    recorded["errors"][3] = "Traceback\nConnectionResetError: peer"
    file.write_text(json.dumps(recorded))
    with pytest.raises(LaunchError, match=r"1 of 16 requests failed: ConnectionResetError: peer"):
        read(file)
    with pytest.raises(LaunchError, match="left no result"):
        read(tmp_path / "nothing.json")


def requests(
    seconds: float, ttft: float, tpot: float, count: int = 100, running: int | None = None
) -> LoadResult:
    """As many requests of ten tokens, all the same."""
    same = np.full(count, 1.0)
    return LoadResult(seconds, 10 * count, same * ttft, same * tpot, same * tpot, running)


def test_a_level_is_met_by_the_99th_percentile() -> None:
    limits = Level("l", 100, 10)
    fast, slow = requests(1.0, 90, 9), requests(1.0, 110, 9, count=1)
    assert fast.good(limits) == 100 and slow.good(limits) == 0
    both = together([fast, fast, slow])
    assert both.good(limits) == 200 and both.seconds == 3.0
    assert both.meets(limits)  # one of 201 is out
    assert not together([fast, slow, slow, slow]).meets(limits)
    assert not requests(1.0, 90, 11).meets(limits)


def test_levels_of_the_command_line() -> None:
    assert [level(str(each)) for each in LEVELS] == list(LEVELS)
    assert level("batch=5000:250.5") == Level("batch", 5000, 250.5)
    for wrong in ("chat", "chat=1", "chat=1:0", "=1:1", "a b=1:1", "chat=x:1"):
        with pytest.raises(typer.BadParameter, match="is not like interactive=500:30"):
            level(wrong)


def test_cases(folder: Path) -> None:
    direct = ["stock", "softmax", "selective", "selective pruned", "w4"]
    expected = [direct[0], *(name + end for name in direct[1:] for end in ("", " + gateway"))]
    found = {s.name: s for s in subjects_of(cases(folder, folder / "w4"), OPTIONS, [], "all")}
    assert list(found) == expected
    assert found["w4 + gateway"].server is found["w4"].server
    assert found["w4"].case.weights == "w4-g64-e8"
    command = {name: " ".join(subject.server.command) for name, subject in found.items()}
    assert "--attention-backend=cpu_attn" in command["stock"]
    assert '"kv_budgets": [8, 4, 12]' in command["selective pruned"]
    assert "kv_budgets" not in command["selective"]
    assert "--attention-backend" not in command["softmax"]

    one = subjects_of(cases(folder), OPTIONS, [], "one")
    assert [subject.name for subject in one] == [
        "stock",
        "softmax",
        "softmax + gateway",
        "selective",
        "selective pruned",
    ]
    bare = subjects_of(cases(folder), OPTIONS, [], "none", stock=False)
    assert [subject.name for subject in bare] == direct[1:4]


def test_backends_and_dtypes(folder: Path) -> None:
    """A case each, the first the peer; packed ones in the first dtype."""
    given = CaseOptions(
        [folder / "softmax"], [folder / "w4"], dtypes=[Dtype.FLOAT32, Dtype.BFLOAT16]
    )
    found = replace(given, backends=["cpu_attn", "softmax"]).cases()
    assert [(case.name, case.weights, case.dtype) for case in found] == [
        ("softmax cpu_attn", "float32", "float32"),
        ("softmax softmax", "float32", "float32"),
        ("softmax cpu_attn bfloat16", "bfloat16", "bfloat16"),
        ("softmax softmax bfloat16", "bfloat16", "bfloat16"),
        ("w4 cpu_attn", "w4-g64-e8", "float32"),
        ("w4 softmax", "w4-g64-e8", "float32"),
    ]
    third = subjects_of(found, OPTIONS, [], "none", stock=False)[2].server.command
    assert "--dtype=bfloat16" in third and "--attention-backend=cpu_attn" in third
    names = ["stock", "stock bfloat16", "softmax", "softmax bfloat16", "w4"]
    assert [each.name for each in subjects_of(given.cases(), OPTIONS, [], "none")] == names


def test_a_plain_llama_has_a_peer_without_our_plugins(tmp_path: Path) -> None:
    write_tiny_llama(tmp_path)
    cases = CaseOptions([tmp_path], backends=["cpu_attn", "softmax"]).cases()
    found = subjects_of(cases, OPTIONS, [], "none", stock=False)
    plugins = [each.server.environment.get("VLLM_PLUGINS") for each in found]
    assert plugins == ["", None]


def test_rows(folder: Path, tmp_path: Path) -> None:
    """Ratios are made inside a round; what failed has a row that says why."""
    slow, eight = Load(4.0), Load(concurrency=8)
    runs: Runs = {
        ("stock", slow): {0: requests(1.0, 100, 20), 1: requests(2.0, 200, 40)},
        ("softmax", slow): {0: requests(0.5, 100, 10), 1: requests(2.0, 100, 10)},
        ("stock", Load()): {0: requests(1.0, 100, 20)},
        ("selective", slow): {1: requests(1.0, 900, 20)},
        ("softmax", eight): {
            0: requests(1.0, 100, 20, running=7),
            1: requests(1.0, 9, 2, running=8),
        },
    }
    failed = {"selective": "ended with exit code 1", "selective pruned": "did not start in 3 s"}
    rows = rows_of(subjects(folder), [slow, Load(), eight], LEVELS, runs, failed)
    names = ["stock", "stock", "softmax", "softmax", "selective", "selective", "selective pruned"]
    assert [row["case"] for row in rows] == names
    assert [row["error"] for row in rows[5:]] == list(failed.values())
    assert [row.get("request_rate") for row in rows] == [4.0, "inf", 4.0, "inf", 4.0, None, None]
    assert [row.get("concurrency") for row in rows] == [None, None, None, 8, None, None, None]
    assert [row.get("running") for row in rows[2:4]] == [None, 8]
    stored = weight_bytes(folder / "softmax", "float32")
    assert rows[2]["weight_bytes"] == stored
    softmax, selective = rows[2], rows[4]
    assert (softmax["tokens_per_s_ratio_min"], softmax["tokens_per_s_ratio_max"]) == (1.0, 2.0)
    assert (softmax["ttft_ms_ratio"], softmax["tpot_ms_ratio"]) == (0.75, 0.375)
    assert (selective["rounds"], selective["tokens_per_s_ratio"]) == (1, 2.0)
    assert softmax["interactive_met"] and softmax["interactive_goodput"] == 200 / 2.5
    assert not selective["interactive_met"] and selective["server_share"] == 1.0
    # The peer's slower round at 4/s took 40 ms a token.
    assert capacity(rows, LEVELS[0]) == {"stock": 100.0, "softmax": 100.0, "selective": 0.0}
    assert len(table(rows, LEVELS).splitlines()) == 6
    plot(tmp_path / "plot.png", "title", rows, LEVELS)
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    json.dumps(rows, allow_nan=False)


def test_without_a_peer(folder: Path) -> None:
    """What the peer did not measure has no ratio."""
    runs: Runs = {("softmax", Load(4.0)): {0: requests(1.0, 100, 20)}}
    rows = rows_of(subjects(folder), [Load(4.0)], LEVELS, runs, {"stock": "ended"})
    assert [row["error"] for row in rows] == ["ended", ""]
    assert rows[1]["tokens_per_s_ratio"] is None
    assert "softmax" in table(rows, LEVELS)


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--kv-budgets", "8", "8"], "2 budgets; "),
        (["--prompt-len=1000"], "prompt and answer take 1064 tokens, softmax 1024"),
        (["--packed=nowhere"], "nowhere is not a checkpoint"),
        (["--ckpts=nowhere"], "nowhere is not a checkpoint"),
        (["--kv-budgets", "0", "8", "4"], "--kv-budgets 0 stands alone"),
        (["--level=chat"], "'chat' is not like interactive=500:30 (ms)"),
        (["--request-rates=0"], "'--request-rates'"),
        (["--concurrency=0"], "'--concurrency'"),
        (["--kv-cache-memory-bytes=2T"], "'2T' is not a number of bytes above 0, like 256M"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(folder: Path, more: list[str], line: str, commands: Commands) -> None:
    given = ["--ckpts", folder / "softmax", folder / "selective"]
    budgets = [] if "--kv-budgets" in more else ["--kv-budgets", "8", "4", "12"]
    assert line in commands.refused(serve, *given, *budgets, *more)


def test_refusals_of_checkpoints(folder: Path, tmp_path: Path, commands: Commands) -> None:
    selective, softmax = folder / "selective", folder / "softmax"
    line = commands.refused(serve, "--ckpts", selective, "--kv-budgets", "0")
    assert "stock vLLM needs a softmax checkpoint" in line
    line = commands.refused(serve, "--ckpts", softmax, "--packed", selective)
    assert "is not from quant.quantize" in line
    again = tmp_path / "softmax"
    again.symlink_to(folder / "softmax")
    copied = shutil.copytree(again, tmp_path / "other" / "softmax")
    line = commands.refused(serve, "--ckpts", softmax, copied)
    assert "folders are called softmax: rename one" in line


def bench(folder: Path, *arguments: str | Path) -> tuple[int, dict[str, Any], str]:
    """Run the command to its end; return its code, its JSON object and its stderr."""
    command = [sys.executable, "-m", *map(str, arguments), "--json", "--rounds=1"]
    command += [f"--log-folder={folder}", f"--csv={folder / 'serve.csv'}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.stdout, done.stderr
    assert not ours()
    return done.returncode, json.loads(done.stdout), done.stderr


SMALL = ("--requests=6", "--prompt-len=64", "--new-tokens=8", "--enforce-eager", "--threads=1",
         "--kv-cache-memory-bytes=64M")  # fmt: skip


@pytest.mark.slow
def test_a_run_with_a_case_that_fails(folder: Path, tmp_path: Path) -> None:
    """Two servers measured, one also through the gateway; one without weights does not start."""
    broken = shutil.copytree(folder / "softmax", tmp_path / "broken")
    (broken / "model.safetensors").unlink()
    checkpoints = ("--ckpts", folder / "softmax", broken)
    load = ("--request-rates", "inf", "--level=any=60000:60000")
    code, found, errors = bench(tmp_path, "benchmarks.serve", *checkpoints, *load, *SMALL)
    assert code == 1
    rows = {row["case"]: row for row in found["rows"]}
    assert list(rows) == ["stock", "softmax", "softmax + gateway", "broken"]
    assert "broken failed: bench-broken ended with exit code" in errors
    assert rows["broken"]["error"]
    for name in ("stock", "softmax", "softmax + gateway"):
        row = rows[name]
        assert (row["rounds"], row["requests"], row["any_share"]) == (1, 6, 1.0)
        assert row["tokens_per_s"] > 0 and row["ttft_ms_p99"] >= row["ttft_ms_p50"] > 0
        assert row["any_goodput"] == pytest.approx(row["requests_per_s"])
        assert found["most_requests_per_s"]["any"][name] == row["requests_per_s"]
    csv = tmp_path / "serve.csv"
    assert list(pd.read_csv(csv)["path"]) == ["direct", "direct", "gateway", "direct"]
    assert csv.with_suffix(".png").exists()


@pytest.mark.slow
def test_a_run_by_backend_and_batch(folder: Path, tmp_path: Path) -> None:
    """Packed weights beside unpacked ones; the backend that may not serve them says why."""
    given = ("--ckpts", folder / "softmax", "--packed", folder / "w4", "--gateway=none")
    loads = ("--backends", "softmax", "softpick", "--concurrency", "1", "2")
    code, found, errors = bench(tmp_path, "benchmarks.serve", *given, *loads, *SMALL)
    assert code == 1
    rows = [row for row in found["rows"] if not row["error"]]
    measured = [(row["case"], row["concurrency"]) for row in rows]
    assert measured == [(f"{name} softmax", n) for name in ("softmax", "w4") for n in (1, 2)]
    assert rows[0]["weight_bytes"] > 2 * rows[2]["weight_bytes"]
    failed = [row for row in found["rows"] if row["error"]]
    assert [row["case"] for row in failed] == ["softmax softpick", "w4 softpick"]
    assert all("was trained with softmax" in row["error"] for row in failed)
    assert "Engine core initialization failed" not in errors


@pytest.mark.slow
def test_a_run_within_budgets(tmp_path: Path) -> None:
    """Memory for a few unpruned requests, or for all pruned ones. A bundled checkpoint, since a
    smaller model answers faster than the API server counts what runs."""
    code, found, errors = bench(tmp_path, *STANDARD[Benchmark.PRUNING])
    assert code == 0, errors
    unpruned, pruned = found["rows"]
    assert unpruned["running"] < pruned["running"] == 64
    assert unpruned["tokens_per_s_ratio"] == 1.0
