"""`python -m benchmarks.engines`: real engines, and what it counts."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import engines
from tests.quantized import quantize
from tests.tiny import tiny_checkpoint


def test_ratios_are_made_inside_a_round() -> None:
    peer = engines.Engine("float32", "float32", [], decode=[10.0, 20.0], prefill=[100.0, 100.0])
    mine = engines.Engine("w4", "float32", [], decode=[20.0, 40.0], prefill=[50.0, 150.0])
    row = engines.row_of(mine, peer)
    assert (row["decode_tokens_per_s_median"], row["decode_ratio_median"]) == (30, 2)
    assert (row["prefill_ratio_p20"], row["prefill_ratio_p80"]) == (0.7, 1.3)


def test_an_engine_that_ends(tmp_path: Path) -> None:
    """Its last words are said."""
    engine = engines.Engine("w4", "float32", [sys.executable, "-c", "raise SystemExit('no room')"])
    engine.start(tmp_path / "log")
    with pytest.raises(Exception, match=r"w4 ended: no room \(log: .*\)"):
        engine.ask(64, 1)
    assert engine.process.wait() == 1


@pytest.mark.slow
def test_engines(tmp_path: Path) -> None:
    """Stock vLLM and packed weights on a small model."""
    source = tiny_checkpoint(
        tmp_path / "source", "softmax", vocab_size=30000, max_position_embeddings=1024
    )
    quantize([str(source), str(tmp_path / "w4"), "--bits", "4", "--scheme", "rtn"])
    command = [sys.executable, "-m", "benchmarks.engines", "--packed", str(tmp_path / "w4")]
    command += ["--ckpt", str(source), "--dtypes", "float32", "--rounds", "2", "--json"]
    command += [
        "--new-tokens",
        "4",
        "--csv",
        str(tmp_path / "t.csv"),
        "--log-folder",
        str(tmp_path),
    ]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    stock, packed = json.loads(done.stdout)["rows"]
    assert (stock["weights"], packed["weights"]) == ("float32", "w4-g64")
    assert stock["decode_ratio_median"] == 1 and packed["prefill_tokens_per_s_median"] > 0
    assert (tmp_path / "t.csv").read_text().count("\n") == 3
