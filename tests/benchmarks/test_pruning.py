"""`python -m benchmarks.pruning`: what it counts, its refusals, and a run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pandas as pd
import pytest

from benchmarks.__main__ import STANDARD, Benchmark
from benchmarks.pruning import PruningPlan, plan_of, pruning
from tests.conftest import Commands
from tests.tiny import tiny_checkpoint

BUDGETS = [8, 4, 12]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers, two KV heads of 32, context 1024."""
    return tiny_checkpoint(tmp_path_factory.mktemp("selective"), "selective")


def plan(ckpt: Path, kv_budgets: list[int], memory: int | None = None, **given: Any) -> PruningPlan:
    """Return what is sent of 8 requests of 100 + 20 tokens."""
    counts = {"prompt_len": 100, "new_tokens": 20, "requests": 8, "rounds": 1, "seed": 0}
    fields: dict[str, Any] = {"max_model_len": 512, "dtype": "float32", **counts, **given}
    return plan_of(ckpt, kv_budgets, memory, **fields)


def test_bytes_of_a_request(checkpoint: Path) -> None:
    unpruned, pruned = plan(checkpoint, BUDGETS).kv_bytes()
    assert unpruned == 3 * 120 * 2 * (2 * 32 * 4 + 4)
    assert pruned == 24 * (2 * 2 * 32 * 4 + 8)
    half = plan(checkpoint, BUDGETS, dtype="bfloat16").kv_bytes()
    assert half == (3 * 120 * 2 * (2 * 32 * 2 + 4), 24 * (2 * 2 * 32 * 2 + 8))


def test_a_budget_beyond_the_context_is_the_context(checkpoint: Path) -> None:
    assert plan(checkpoint, [8, 600, 8]).kv_bytes()[1] == (8 + 512 + 8) * (2 * 2 * 32 * 4 + 8)


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["--kv-cache-memory-bytes=700000"], "700000 holds no unpruned request of 512 tokens in f"),
        (["--kv-budgets", "8", "8"], "--kv-budgets has 2 entries and the model 3 layers"),
        (["--kv-budgets", "8", "4", "12", "--prompt-len=500"], "longer than --max-model-len"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_refusals(checkpoint: Path, arguments: list[str], line: str, commands: Commands) -> None:
    assert line in commands.refused(pruning, f"--ckpt={checkpoint}", *arguments)


def test_defaults_hold_a_request_of_any_dtype(checkpoint: Path) -> None:
    for dtype, size in (("float32", 4), ("bfloat16", 2)):
        found = plan(checkpoint, [], dtype=dtype, max_model_len=520)
        assert found.kv_budgets == [32] * 3
        assert found.kv_cache_memory_bytes == 4 * 5 * 128 * 3 * 2 * (2 * 32 * size + 4)


def test_another_attention_is_refused(tmp_path: Path, commands: Commands) -> None:
    tiny_checkpoint(tmp_path, "softmax")
    assert "has no attention that can be pruned" in commands.refused(pruning, f"--ckpt={tmp_path}")


@pytest.mark.slow
def test_measures_both(tmp_path: Path) -> None:
    """Memory for three or four unpruned requests of 256 tokens, or for all pruned ones. A bundled
    checkpoint, since a smaller model answers faster than the API server counts what runs."""
    csv = tmp_path / "pruning.csv"
    command = [
        sys.executable,
        "-m",
        *STANDARD[Benchmark.PRUNING],
        "--rounds=1",
        f"--csv={csv}",
        "--json",
    ]
    command += [f"--log-folder={tmp_path}"]
    ended = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ended.returncode == 0, ended.stderr
    unpruned, pruned = json.loads(ended.stdout)["rows"]
    assert unpruned["running"] < pruned["running"] == 64
    assert unpruned["ratio"] == 1.0
    assert pruned["long_usage_early"] == pruned["long_usage_late"]
    assert unpruned["long_usage_early"] < unpruned["long_usage_late"]
    assert list(pd.read_csv(csv)["server"]) == ["unpruned", "pruned"]
