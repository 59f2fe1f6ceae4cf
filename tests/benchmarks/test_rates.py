"""`python -m benchmarks.rates`: its statistics, its files, its refusals, and a run of it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import psutil
import pytest

from attn_kernels import variant_names
from benchmarks.rates import Case, Round, decode_rate, measured, parse, results
from benchmarks.servers import Answer, append_csv
from serving.launch.process import LaunchError
from tests.tiny import tiny_checkpoint

BACKENDS = ("cpu_attn", "softmax")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Context 1024, softmax: every backend that may serve softmax may serve it."""
    return tiny_checkpoint(tmp_path_factory.mktemp("softmax"), "softmax")


def bench(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command, run to its end."""
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
    uncached = measured([Answer(1.0, [3.0], 0), Answer(1.5, [5.0], 0)], prompt_len=100)
    assert uncached == Round(rate=200 / 4.0, ttft=2.75, cached=0.0)
    cached = measured([Answer(1.0, [2.0, 2.5, 3.0], 75)], prompt_len=100)
    assert cached == Round(rate=2.0, ttft=1.0, cached=0.75)


def a_case() -> Case:
    """Two backends, three decode rounds and one uncached round."""
    decode = [(10.0, 20.0), (5.0, 15.0), (20.0, 20.0)]
    rounds = [[Round(rate, 0.1, 0.9) for rate in pair] for pair in decode]
    return Case(1024, 8, [[Round(100.0, 1.0, 0.0), Round(50.0, 2.0, 0.0)]], rounds)


def test_ratios_are_made_inside_a_round() -> None:
    first, second = results(BACKENDS, [a_case()])
    assert first["decode_ratio_median"] == first["prefill_ratio_median"] == 1.0
    assert second["decode_ratios"] == [2.0, 3.0, 1.0]
    assert second["decode_ratio_median"] == 2.0
    assert second["decode_tokens_per_s_median"] == 20.0
    assert second["prefill_ratio_median"] == 0.5
    assert second["ttft_uncached_s_median"] == 2.0
    assert second["ttft_cached_s_median"] == 0.1


def test_csv_grows_and_keeps_what_is_in_it(tmp_path: Path) -> None:
    path, rows = tmp_path / "results" / "rates.csv", results(BACKENDS, [a_case()])
    append_csv(path, {"date": "2026-01-01", "machine": "a, b"}, rows, ["decode_ratios"])
    before = path.read_text().splitlines()
    append_csv(path, {"date": "2026-01-02", "machine": "c", "new": 1}, rows, ["decode_ratios"])
    after = pd.read_csv(path)
    assert list(after["date"]) == ["2026-01-01"] * 2 + ["2026-01-02"] * 2
    assert list(after["backend"]) == [*BACKENDS, *BACKENDS]
    assert after["new"].isna().tolist() == [True, True, False, False]
    old = path.read_text().splitlines()[1:3]
    assert [line.removesuffix(",") for line in old] == before[1:]


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        (["--prompt-lens", "0"], "'0' is not a whole number above 0"),
        (["--new-tokens", "1"], "has no decode step"),
        (["--prompt-lens", "1000"], "prompt and answer take 1064 tokens, the model 1024"),
        (["--ckpt", "nowhere"], "nowhere is not a checkpoint"),
    ],
)
def test_bad_input_is_one_line(checkpoint: Path, arguments: list[str], reason: str) -> None:
    ended = bench("--ckpt", checkpoint, *arguments)
    assert ended.returncode == 2
    assert reason in ended.stderr.splitlines()[-1]
    assert "Traceback" not in ended.stderr


@pytest.mark.parametrize("name", variant_names())
def test_defaults_fit_the_checkpoint(name: str, tmp_path: Path) -> None:
    """A checkpoint that names its attention runs with no other; a prompt has to fit."""
    ckpt = tiny_checkpoint(tmp_path, name)  # 1024 tokens
    options = parse(["--ckpt", str(ckpt)])
    assert options.backends == (["cpu_attn", "softmax"] if name == "softmax" else [name])
    assert options.prompt_lens == [960]


def ours() -> list[psutil.Process]:
    """Processes of vLLM below this one or left behind by it; dead ones do not count."""
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
        *("--enforce-eager", "--kv-cache-memory-bytes=64M", "--log-folder", tmp_path),
    )
    assert ended.returncode == 0, ended.stderr
    rows = json.loads(ended.stdout.splitlines()[-1])["rows"]
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
