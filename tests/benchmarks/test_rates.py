"""`python -m benchmarks.rates`: its statistics, its files, its refusals, and a run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Coroutine
from pathlib import Path
from typing import Any

import pandas as pd
import psutil
import pytest

from attn_kernels import variant_names
from benchmarks.rates import Load, Round, decode_rate, rates, round_of, rows_of
from benchmarks.servers import Answer
from serving.launch.process import LaunchError
from tests.conftest import Commands
from tests.tiny import tiny_checkpoint

BACKENDS = ("cpu_attn", "softmax")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Context 1024, softmax: every backend that may serve softmax may serve it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("softmax"), "softmax")


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """Return the command, run to its end."""
    command = [sys.executable, "-m", "benchmarks.rates", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_decode_rate_counts_only_while_all_decode() -> None:
    early = Answer(0.0, [1.0, 2.0, 3.0, 4.0], 0)
    late = Answer(0.0, [2.5, 3.5, 4.5, 5.5], 0)
    # From 2.5 s, the late one's first token, to 4 s, the early one's last: 3, 3.5 and 4.
    assert decode_rate([early, late]) == pytest.approx(3 / 1.5)
    assert decode_rate([early]) == pytest.approx(1.0)


def test_decode_rate_of_requests_that_never_met() -> None:
    with pytest.raises(LaunchError, match="did not overlap"):
        decode_rate([Answer(0.0, [1.0, 2.0], 0), Answer(0.0, [3.0, 4.0], 0)])


def test_figures_of_a_round() -> None:
    uncached = round_of([Answer(1.0, [3.0], 0), Answer(1.5, [5.0], 0)], prompt_len=100)
    assert uncached == Round(rate=200 / 4.0, ttft=2.75, cached=0.0)
    cached = round_of([Answer(1.0, [2.0, 2.5, 3.0], 75)], prompt_len=100)
    assert cached == Round(rate=2.0, ttft=1.0, cached=0.75)


def a_load() -> Load:
    """Two backends, three decode rounds and one uncached round."""
    decode = [(10.0, 20.0), (5.0, 15.0), (20.0, 20.0)]
    rounds = [[Round(rate, 0.1, 0.9) for rate in pair] for pair in decode]
    return Load(1024, 8, [[Round(100.0, 1.0, 0.0), Round(50.0, 2.0, 0.0)]], rounds)


def test_ratios_are_made_inside_a_round() -> None:
    first, second = rows_of(BACKENDS, [a_load()])
    assert first["decode_ratio_median"] == first["prefill_ratio_median"] == 1.0
    assert second["decode_ratios"] == [2.0, 3.0, 1.0]
    assert second["decode_ratio_median"] == 2.0
    assert second["decode_tokens_per_s_median"] == 20.0
    assert second["prefill_ratio_median"] == 0.5
    assert second["ttft_uncached_s_median"] == 2.0
    assert second["ttft_cached_s_median"] == 0.1


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--prompt-lens", "0"], "'--prompt-lens'"),
        (["--new-tokens", "1"], "has no decode step"),
        (["--prompt-lens", "1000"], "prompt and answer take 1064 tokens, "),
        (["--kv-cache-memory-bytes", "2T"], "'2T' is not a number of bytes above 0, like 256M"),
    ],
)
def test_bad_input_is_one_line(
    checkpoint: Path, arguments: list[str], reason: str, commands: Commands
) -> None:
    assert reason in commands.refused(rates, "--ckpt", checkpoint, *arguments)


@pytest.mark.parametrize("name", variant_names())
def test_defaults_fit_the_checkpoint(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Commands
) -> None:
    """A checkpoint that names its attention runs with no other; a prompt has to fit."""
    ckpt = tiny_checkpoint(tmp_path, name)  # 1024 tokens
    seen: dict[str, Any] = {}

    async def with_all(servers: list[Any], work: Coroutine[Any, Any, None]) -> list[Load]:
        work.close()
        seen["names"] = [server.name for server in servers]
        seen["command"] = servers[0].command
        return []

    monkeypatch.setattr("benchmarks.servers.with_all", with_all)
    assert "nothing was measured" in commands.run(rates, "--ckpt", ckpt, "--no-save")
    assert seen["names"] == (["cpu_attn", "softmax"] if name == "softmax" else [name])
    assert "--max-model-len=1024" in seen["command"]
    assert f"--kv-cache-memory-bytes={2 << 30}" in seen["command"]


def ours() -> list[psutil.Process]:
    """Return processes of vLLM below this one or left behind by it; dead ones do not count."""
    alive = [p for p in psutil.process_iter(["name"]) if p.status() != psutil.STATUS_ZOMBIE]
    mine = {p.pid for p in psutil.Process().children(recursive=True)}
    return [p for p in alive if p.pid in mine and "vllm" in p.info["name"].lower()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--backends", "softpick"], "trained with softmax"),
        (["--kv-cache-memory-bytes", "400000"], "KV cache is needed"),
    ],
)
def test_why_a_server_does_not_start(
    arguments: list[str], reason: str, checkpoint: Path, tmp_path: Path
) -> None:
    """Its own words, not what follows from them."""
    common = ("--enforce-eager", "--backends", "softmax", "--threads", "1", "--no-save")
    ended = bench("--ckpt", checkpoint, *common, *arguments, "--log-folder", tmp_path)
    assert ended.returncode == 1
    last = ended.stderr.splitlines()[-1]
    assert reason in last and "Engine core initialization failed" not in last


@pytest.mark.slow
def test_measures_two_servers(checkpoint: Path, tmp_path: Path) -> None:
    csv = tmp_path / "rates.csv"
    ended = bench(
        *("--ckpt", checkpoint, "--backends", *BACKENDS, "--prompt-lens", "300", "--batches"),
        *("1", "2", "--rounds", "2", "--prefill-rounds", "1", "--threads", "1", "--csv", csv),
        *("--enforce-eager", "--kv-cache-memory-bytes=64M", "--log-folder", tmp_path, "--json"),
    )
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(ended.stdout)["rows"]
    assert [(row["backend"], row["batch"]) for row in rows] == [
        (backend, batch) for batch in (1, 2) for backend in BACKENDS
    ]
    for row in rows:
        assert row["decode_tokens_per_s_median"] > 0 and row["prefill_tokens_per_s_median"] > 0
        assert row["prefill_cached"] == 0.0
        assert row["decode_cached"] == pytest.approx(256 / 300)  # two blocks of 128
    assert len(pd.read_csv(csv)) == 4
    assert not ours()


@pytest.mark.slow
def test_a_server_that_does_not_start(checkpoint: Path, tmp_path: Path) -> None:
    ended = bench(
        *("--ckpt", checkpoint, "--backends", "cpu_attn", "softpick", "--prompt-lens", "64"),
        *("--enforce-eager", "--kv-cache-memory-bytes=64M", "--log-folder", tmp_path),
    )
    assert ended.returncode == 1
    assert "was trained with softmax attention" in ended.stderr.splitlines()[-1]
    assert not ours()
