"""No request waits for a packed product to be compiled: all are when the weights are loaded."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from quant.checkpoint import Recipe, quantize_checkpoint
from tests.tiny import tiny_checkpoint


@pytest.mark.integration
@pytest.mark.parametrize(
    "recipe", [Recipe(3, "rtn", embeddings=8), Recipe(4, "rtn", 64, symmetric=True)], ids=["3", "4"]
)
def test_compiled_at_startup(recipe: Recipe, tmp_path: Path) -> None:
    """With sums in parts and without, head and lookups."""
    source = tiny_checkpoint(tmp_path / "source", "softpick", intermediate_size=1408)
    quantize_checkpoint(source, tmp_path / "out", recipe, None, "a test", {})
    environment = os.environ | {
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "TRITON_INTERPRET": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
    }
    ran = subprocess.run(
        [sys.executable, "-m", "tests.vllm_quant.compiled_at_startup", str(tmp_path / "out")],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["layers"] >= 12 and found["startup"] >= 5
    assert found["load"] == []
