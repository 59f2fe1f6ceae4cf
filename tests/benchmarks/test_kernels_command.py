"""`python -m benchmarks.kernels` as it is used, on tiny cases."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from attn_kernels import get_variant, variant_names
from attnserve import machine
from benchmarks.kernels import __main__ as command
from benchmarks.kernels import measure
from benchmarks.kernels.__main__ import kernels
from tests.benchmarks.fakes import NotQuite, Refusing, TorchKernel
from tests.conftest import Commands

TINY = [
    *("--ctx", "64", "--batch", "2", "--new-tokens", "48", "--context", "0", "32"),
    *("--head-dims", "32", "--num-heads", "4", "--threads", "1", "--seconds", "0.001"),
]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small buffers, so that a case takes milliseconds."""
    monkeypatch.setattr(command, "COLD_BYTES", 2**16)
    monkeypatch.setattr(measure, "READ_BYTES", 2**20)
    monkeypatch.setattr(measure, "SGEMM_SIZE", 64)
    monkeypatch.setattr(machine, "last_level_cache", lambda: 0)


@pytest.mark.integration
def test_end_to_end(tmp_path: Path, commands: Commands) -> None:
    results = tmp_path / "results" / "kernels.csv"
    shown = commands.run(kernels, *TINY, "--csv", results)
    found = json.loads(commands.run(kernels, *TINY, "--csv", results, "--json"))
    rows = found["rows"]
    # Each variant: one decode and two prefill cases, in two dtypes.
    assert len(rows) == 6 * len(variant_names())
    for row in rows:
        assert row["ratio_vllm"] > 0 and row["ratio_sdpa"] > 0 and row["fraction_of_limit"] > 0
        assert ("new_tokens" in row) == (row["phase"] == "prefill")
        assert row["variant"] in shown
    assert found["machine"]["torch"] == torch.__version__ and found["machine"]["threads"] == 1
    with results.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == 2 * len(rows)
    assert all(row["vllm_library"].startswith("_C") and row["commit"] for row in written)
    assert results.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.integration
def test_writing(tmp_path: Path, commands: Commands) -> None:
    """Beside vLLM's and torch's; what is written is checked by attending to it."""
    kinds = ["--variants", "softmax", "--kv-formats", "int4_per_token_head", "--phases", "write"]
    given = [*TINY, *kinds, "--dtypes", "bf16", "--no-save"]
    rows = json.loads(commands.run(kernels, *given, "--json"))["rows"]
    assert [row["variant"] for row in rows] == ["softmax", "softmax int4_per_token_head"]
    for row in rows:
        assert row["ratio_vllm"] > 0 and row["ratio_sdpa"] > 0 and row["new_tokens"] == 48


@pytest.mark.parametrize(
    ("fake", "why"), [(NotQuite, "against the reference"), (Refusing, "refused: no head size")]
)
def test_wrong_kernel_gets_no_ratio(
    fake: type[TorchKernel], why: str, monkeypatch: pytest.MonkeyPatch, commands: Commands
) -> None:
    fakes = {
        "softpick": TorchKernel(get_variant("softpick")),
        "softmax": fake(get_variant("softmax")),
    }
    monkeypatch.setattr(command, "load_kernels", lambda *_: fakes)
    tiny = [*TINY, "--no-save", "--phases", "decode", "--dtypes", "fp32"]
    found = json.loads(commands.run(kernels, *tiny, "--json", code=1))
    good, wrong = found["rows"]
    assert good["ratio_vllm"] > 0
    assert wrong["ratio_vllm"] is None and wrong["ratio_sdpa"] is None
    assert why in wrong["note"] and why in commands.printed.err
    assert why in commands.run(kernels, *tiny, code=1)


def test_help_states_defaults(commands: Commands) -> None:
    shown = " ".join(commands.run(kernels, "--help").split())
    assert "default: 6.0" in shown and "default: 512 4096 16384" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "softpik"], "did you mean 'softpick'"),
        (["--threads", "0"], "'--threads'"),
        (["--seconds", "nan"], "not a time above 0"),
        (["--isa", "sse"], "--isa sse: this processor has"),
        (["--num-heads", "9"], "9 heads cannot share 2 KV heads"),
        (["--ctx", "many"], "'--ctx'"),
        (["--batch", "1000000000"], "GB of memory"),
    ],
)
def test_bad_arguments(arguments: list[str], message: str, commands: Commands) -> None:
    assert message in commands.refused(kernels, "--no-save", *arguments)


def test_csv_that_is_a_folder(tmp_path: Path, commands: Commands) -> None:
    message = commands.refused(kernels, *TINY, "--csv", tmp_path)
    assert "results cannot be written: " in message
