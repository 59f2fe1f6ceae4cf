"""`python -m benchmarks.memory`: what it predicts, its rows and refusals. A run of it is slow."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.__main__ import CHECKPOINTS, PACK, STANDARD, Benchmark
from benchmarks.checkpoints import CaseOptions, ServerCase, weight_bytes
from benchmarks.memory.__main__ import QUANTITIES, memory, plot, row_of, table
from benchmarks.memory.measure import predict, requests_of
from benchmarks.options import RequestOptions, ServerOptions
from benchmarks.results import append_csv
from tests.benchmarks.conftest import ours
from tests.conftest import Commands
from tests.quantized import quantize

LAYERS, KV_HEADS, HEAD = 3, 2, 32


def cases(folder: Path, kv_budgets: tuple[int, ...] = (8, 4, 12)) -> list[ServerCase]:
    """Return those of all checkpoints: softmax, selective, selective within budgets, packed."""
    ckpts = [folder / "softmax", folder / "selective"]
    return CaseOptions(ckpts, [folder / "w4"], list(kv_budgets)).cases()


OPTIONS = ServerOptions(1, 2_000_000)


def test_predictions(folder: Path) -> None:
    requests = RequestOptions(200, 56)
    softmax, selective, pruned, packed = (predict(c, requests, OPTIONS) for c in cases(folder))
    token = LAYERS * KV_HEADS * 2 * HEAD * 4
    assert softmax["kv_bytes_per_token"] == token
    assert softmax["kv_bytes_per_request"] == 256 * token
    assert softmax["requests_in_flight"] == (2_000_000 // (128 * token) - 1) // 2 == 4
    assert softmax["kv_cache_bytes"] == 2_000_000 // (128 * token) * 128 * token
    assert selective["kv_bytes_per_token"] == token + LAYERS * KV_HEADS * 4
    page = (8 + 4 + 12) * (KV_HEADS * 2 * HEAD * 4 + 8)
    assert pruned["kv_bytes_per_request"] == page
    assert pruned["requests_in_flight"] == 2_000_000 // page - 1
    assert requests_of(pruned) > pruned["requests_in_flight"]
    assert packed["kv_bytes_per_token"] == token
    assert packed["weight_bytes"] == weight_bytes(folder / "w4", "float32")
    vocabulary = json.loads((folder / "softmax/config.json").read_text())["vocab_size"]
    stored = weight_bytes(folder / "softmax", "float32")
    assert softmax["weight_bytes"] == stored + 2 * vocabulary * 128 * 4


def test_a_request_takes_whole_blocks_and_no_budget_is_longer_than_it(folder: Path) -> None:
    requests = RequestOptions(200, 57)
    found = cases(folder, (8, 4, 1000))
    softmax, _, pruned, _ = (predict(case, requests, OPTIONS) for case in found)
    assert softmax["kv_bytes_per_request"] == 384 * LAYERS * KV_HEADS * 2 * HEAD * 4
    assert pruned["kv_bytes_per_request"] == (8 + 4 + 257) * (KV_HEADS * 2 * HEAD * 4 + 8)
    token = LAYERS * KV_HEADS * 2 * HEAD * 2
    half = predict(replace(found[0], dtype="bfloat16"), RequestOptions(200, 56), OPTIONS)
    assert half["kv_bytes_per_token"] == token


def test_rows(folder: Path, tmp_path: Path) -> None:
    case, other, *_ = cases(folder)
    predicted = predict(case, RequestOptions(200, 56), OPTIONS)
    found = {name: 2 * value for name, value in predicted.items()}
    good = row_of(case, predicted, {**found, "blocks": 9, "rss_bytes": 3e6})
    bad = row_of(other, predicted, {}, "ended with exit code 1")
    assert all(good[f"{name}_ratio"] == 2.0 for name in QUANTITIES)
    assert (good["blocks"], good["error"]) == (9, "")
    assert bad["weight_bytes_measured"] is None and bad["error"] == "ended with exit code 1"
    shown = table([good, bad]).splitlines()
    assert len(shown) == 3 and "failed" in shown[2]
    plot(tmp_path / "plot.png", "title", [good, bad])
    assert (tmp_path / "plot.png").stat().st_size > 10_000
    append_csv(tmp_path / "memory.csv", {}, [good, bad])
    assert list(pd.read_csv(tmp_path / "memory.csv")["case"]) == ["softmax", "selective"]


@pytest.mark.parametrize(
    ("more", "line"),
    [
        (["--prompt-len=1000"], "prompt and answer take 1056 tokens, softmax 1024"),
        (["--kv-cache-memory-bytes=500000"], "has no room for a request of softmax"),
        (["--kv-budgets", "8"], "1 budgets; "),
        (["--packed=nowhere"], "nowhere is not a checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(folder: Path, more: list[str], line: str, commands: Commands) -> None:
    given = ["--ckpts", folder / "softmax", folder / "selective", "--new-tokens=56"]
    if "--kv-budgets" not in more:
        given += ["--kv-budgets", "8", "4", "12"]
    assert line in commands.refused(memory, *given, *more, "--no-save")


@pytest.mark.slow
def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four servers, one after another; bytes of the cache are exact. Of bundled checkpoints: a
    smaller model answers faster than the API server can count what runs."""
    monkeypatch.chdir(tmp_path)
    quantize(PACK[1:])
    csv = tmp_path / "memory.csv"
    command = [
        sys.executable,
        "-m",
        *STANDARD[Benchmark.MEMORY],
        f"--csv={csv}",
        "--json",
        "--ckpts",
    ]
    command += [str(CHECKPOINTS / name) for name in ("softmax", "selective")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    names = ["softmax", "selective", "selective pruned", "softpick-w4"]
    assert [row["case"] for row in rows] == names
    for row in rows:
        assert row["kv_bytes_per_request_ratio"] == pytest.approx(1.0, abs=0.01)
        assert row["requests_in_flight_ratio"] == pytest.approx(1.0, abs=0.02)
        assert row["kv_cache_bytes_ratio"] == pytest.approx(1.0, abs=0.01)
        assert row["rss_full_bytes"] > row["rss_bytes"] > row["pss_bytes"] > 10**8
        assert row["weight_bytes_measured"] > 0
    assert len(pd.read_csv(csv)) == 4
    assert not ours()
