"""`python -m benchmarks.kernels` as it is used, on tiny cases."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
import torch

from attn_kernels import get_variant, variant_names
from attnserve import machine
from benchmarks.kernels import limits, run
from benchmarks.kernels.__main__ import main
from tests.benchmarks.fakes import NotQuite, Refusing, TorchKernel

TINY = [
    *("--ctx", "64", "--batch", "2", "--new-tokens", "48", "--context", "0", "32"),
    *("--head-dims", "32", "--dtypes", "fp32", "bf16", "--num-heads", "4"),
    *("--threads", "1", "--seconds", "0.001"),
]


@pytest.fixture(autouse=True)
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small buffers, so that a case takes milliseconds."""
    monkeypatch.setattr(run, "COLD_BYTES", 2**16)
    monkeypatch.setattr(limits, "READ_BYTES", 2**20)
    monkeypatch.setattr(limits, "SGEMM_SIZE", 64)
    monkeypatch.setattr(machine, "last_level_cache", lambda: 0)


def test_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    results = tmp_path / "results" / "kernels.csv"
    for _ in range(2):
        assert main([*TINY, "--csv", str(results)]) == 0
    out = capsys.readouterr().out
    last = json.loads(out.splitlines()[-1])
    rows = last["rows"]
    # Each variant: one decode and two prefill cases, in two dtypes.
    assert len(rows) == 6 * len(variant_names())
    for row in rows:
        assert row["ratio_vllm"] > 0 and row["ratio_sdpa"] > 0 and row["fraction_of_limit"] > 0
        assert ("new_tokens" in row) == (row["phase"] == "prefill")
        assert row["variant"] in out
    assert last["machine"]["torch"] == torch.__version__ and last["machine"]["threads"] == 1
    with results.open(newline="") as file:
        written = list(csv.DictReader(file))
    assert len(written) == 2 * len(rows)
    assert all(row["vllm_library"].startswith("_C") and row["commit"] for row in written)
    assert results.with_suffix(".png").exists()


@pytest.mark.parametrize(
    ("fake", "why"), [(NotQuite, "against the law"), (Refusing, "refused: no head size")]
)
def test_wrong_kernel_gets_no_ratio(
    fake: type[TorchKernel],
    why: str,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    kernels = {
        "softpick": TorchKernel(get_variant("softpick")),
        "softmax": fake(get_variant("softmax")),
    }
    monkeypatch.setattr(run, "load_kernels", lambda *_: kernels)
    assert main([*TINY, "--no-save", "--phases", "decode", "--dtypes", "fp32"]) == 1
    printed = capsys.readouterr()
    good, wrong = json.loads(printed.out.splitlines()[-1])["rows"]
    assert good["ratio_vllm"] > 0
    assert wrong["ratio_vllm"] is None and wrong["ratio_sdpa"] is None
    assert why in wrong["note"] and why in printed.err


def test_help_states_defaults(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(["--help"])
    assert exit_.value.code == 0
    shown = " ".join(capsys.readouterr().out.split())
    assert "default: 6.0" in shown and "default: 512 4096 16384" in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--variants", "softpik"], "did you mean 'softpick'"),
        (["--threads", "0"], "'0' is not a whole number above 0"),
        (["--seconds", "nan"], "not a time above 0"),
        (["--isa", "sse"], "invalid choice: 'sse'"),
        (["--num-heads", "9"], "9 heads cannot share 2 KV heads"),
        (["--ctx", "many"], "'many' is not a whole number above 0"),
    ],
)
def test_bad_arguments(
    arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(arguments)
    assert exit_.value.code == 2
    assert message in capsys.readouterr().err.splitlines()[-1]


def test_csv_that_is_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--csv", str(tmp_path)]) == 1
    assert capsys.readouterr().err.startswith("error: results cannot be written: ")


def test_too_large_a_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*TINY, "--no-save", "--batch", "1000000000"]) == 1
    assert "GB of memory" in capsys.readouterr().err
