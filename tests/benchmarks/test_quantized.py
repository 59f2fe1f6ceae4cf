"""`python -m benchmarks.quantized`: what it counts and refuses. A run of it is slow."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import torch

from benchmarks import packed_products
from benchmarks.checkpoints import packed_name, weight_bytes
from benchmarks.quantized import Weights, quantized, rows_of, table
from benchmarks.rates import Load, Round
from tests.conftest import Commands
from tests.quantized import quantize
from tests.tiny import tiny_checkpoint


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Return a checkpoint of 3 layers with hidden size 128, and its 4-bit form."""
    folder = tmp_path_factory.mktemp("packed")
    source = tiny_checkpoint(folder / "source", "softmax", tie_word_embeddings=True)
    quantize([str(source), str(folder / "w4"), "--bits=4", "--scheme=rtn", "--embeddings=8"])
    return source, folder / "w4"


def test_bytes_of_weights(folders: tuple[Path, Path]) -> None:
    source, packed = folders
    layer = 128 * 128 * 2 + 64 * 128 * 2 + 3 * 128 * 256
    norms = (2 * 3 + 1) * 128
    vocabulary = json.loads((source / "config.json").read_text())["vocab_size"]
    embeddings = vocabulary * 128
    assert weight_bytes(source, "bfloat16") == 2 * (3 * layer + embeddings + norms)
    assert weight_bytes(source, "float32") == 4 * (3 * layer + embeddings + norms)
    # A scale of two bytes and a zero point of one in each group of 64.
    expected = 3 * layer * (4 / 8 + 3 / 64) + embeddings * (1 + 3 / 64) + 2 * norms
    assert weight_bytes(packed, "bfloat16") == expected
    assert packed_name(packed) == "w4-g64-e8"


def test_rows(folders: tuple[Path, Path]) -> None:
    """Ratios are of the same round, to the first server and to the second."""
    rates = [(10.0, 20.0, 40.0), (20.0, 10.0, 30.0), (10.0, 20.0, 30.0)]
    decode = [[Round(rate, 0.1, 0.9) for rate in each] for each in rates]
    load = Load(128, 1, [[Round(100.0, 1.0, 0.0)] * 3], decode)
    names = ("float32", "bfloat16", "w4")
    weights = [Weights(name, "float32", 50) for name in names]
    rows = rows_of(weights, [load], [1, 2, 3])
    assert [row["weights"] for row in rows] == list(names)
    assert rows[2]["decode_ratio_median"] == 3.0
    assert rows[2]["decode_ratio_2_median"] == 2.0
    assert rows[2]["resident_bytes"] == 3
    assert len(table(rows).splitlines()) == 4


def test_refusals(folders: tuple[Path, Path], tmp_path: Path, commands: Commands) -> None:
    source, packed = folders
    line = commands.refused(quantized, f"--ckpt={source}", f"--packed={source}")
    assert f"--packed {source} is not from quant.quantize" in line
    line = commands.refused(quantized, f"--ckpt={tmp_path}", f"--packed={packed}")
    assert "is not a checkpoint" in line


def test_products() -> None:
    """Rows of one step of products: ratios are to torch in the same round."""
    times = {"float32": [4.0, 2.0, 2.0], "bfloat16": [2.0, 2.0, 2.0], "w4": [1.0, 1.0, 2.0]}
    row = packed_products.rows_of(times)[2]
    assert (row["weights"], row["ms_median"]) == ("w4", 1000.0)
    assert (row["x_float32_median"], row["x_bfloat16_median"]) == (2.0, 2.0)
    assert packed_products.packed((40, 64), 4)(torch.ones(2, 64)).shape == (2, 40)


@pytest.mark.slow
def test_a_run(folders: tuple[Path, Path], tmp_path: Path) -> None:
    """Three servers, two rounds; every figure ends up in the file."""
    source, packed = folders
    command = [sys.executable, "-m", "benchmarks.quantized", f"--ckpt={source}", "--enforce-eager"]
    command += [f"--packed={packed}", "--peer-backend=softmax", "--rounds=2", "--new-tokens=8"]
    command += [
        f"--csv={tmp_path / 'out.csv'}",
        f"--log-folder={tmp_path}",
        "--prefill-rounds=1",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert [row["weights"] for row in rows] == ["float32", "bfloat16", "w4-g64-e8"]
    assert all(row["resident_bytes"] > 0 for row in rows)
    assert len(pd.read_csv(tmp_path / "out.csv")) == 3
