"""`python -m benchmarks.memory`: what it predicts, its rows and refusals. A run of it is slow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest

from benchmarks.__main__ import CHECKPOINTS, PACK, STANDARD
from benchmarks.memory.__main__ import parse, plot, row_of, table
from benchmarks.memory.measure import requests_of
from benchmarks.memory.predict import QUANTITIES, predict
from benchmarks.quantized import weight_bytes
from benchmarks.servers import append_csv
from serving.launch.process import LaunchError
from tests.benchmarks.test_rates import ours
from tests.quantized import quantize

LAYERS, KV_HEADS, HEAD = 3, 2, 32


def arguments(folder: Path, *more: str) -> list[str]:
    """All checkpoints; requests of 256 tokens."""
    found = ["--ckpts", str(folder / "softmax"), str(folder / "selective")]
    found += ["--packed", str(folder / "w4"), "--kv-budgets", "8", "4", "12"]
    return [*found, "--prompt-len=200", "--new-tokens=56", "--kv-cache-memory-bytes=2000000", *more]


def test_predictions(folder: Path) -> None:
    options = parse(arguments(folder))
    softmax, selective, pruned, packed = (predict(case, options) for case in options.cases)
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
    options = parse(arguments(folder, "--new-tokens=57", "--kv-budgets", "8", "4", "1000"))
    softmax, _, pruned, _ = (predict(case, options) for case in options.cases)
    assert softmax["kv_bytes_per_request"] == 384 * LAYERS * KV_HEADS * 2 * HEAD * 4
    assert pruned["kv_bytes_per_request"] == (8 + 4 + 257) * (KV_HEADS * 2 * HEAD * 4 + 8)
    half = parse(arguments(folder, "--dtype=bfloat16"))
    token = LAYERS * KV_HEADS * 2 * HEAD * 2
    assert predict(half.cases[0], half)["kv_bytes_per_token"] == token


def test_rows(folder: Path, tmp_path: Path) -> None:
    options = parse(arguments(folder))
    case = options.cases[0]
    predicted = predict(case, options)
    found = {name: 2 * value for name, value in predicted.items()}
    good = row_of(case, predicted, {**found, "blocks": 9, "rss_bytes": 3e6})
    bad = row_of(options.cases[1], predicted, {}, "ended with exit code 1")
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
        (["--kv-budgets", "8"], r"1 budgets; .*selective has 3 layers"),
        (["--packed=nowhere"], "nowhere is not a checkpoint"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(folder: Path, more: list[str], line: str) -> None:
    with pytest.raises(LaunchError, match=line):
        parse(arguments(folder, *more))


@pytest.mark.slow
def test_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Four servers, one after another; bytes of the cache are exact. Of bundled checkpoints: a
    smaller model answers faster than the API server can count what runs."""
    monkeypatch.chdir(tmp_path)
    quantize(PACK[1:])
    csv = tmp_path / "memory.csv"
    command = [sys.executable, "-m", *STANDARD["memory"], f"--csv={csv}", "--ckpts"]
    command += [str(CHECKPOINTS / name) for name in ("softmax", "selective")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    cases = ["softmax", "selective", "selective pruned", "softpick-w4"]
    assert [row["case"] for row in rows] == cases
    for row in rows:
        assert row["kv_bytes_per_request_ratio"] == pytest.approx(1.0, abs=0.01)
        assert row["requests_in_flight_ratio"] == pytest.approx(1.0, abs=0.02)
        assert row["kv_cache_bytes_ratio"] == pytest.approx(1.0, abs=0.01)
        assert row["rss_full_bytes"] > row["rss_bytes"] > row["pss_bytes"] > 10**8
        assert row["weight_bytes_measured"] > 0
    assert len(pd.read_csv(csv)) == 4
    assert not ours()
