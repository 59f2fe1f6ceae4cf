"""No request waits for a kernel to be compiled: a server on a GPU compiles all when it starts."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

CHECKPOINTS = Path(__file__).parents[2] / "checkpoints"


@pytest.mark.integration
@pytest.mark.parametrize(
    ("variant", "parameters"),
    [("lssar", {}), ("selective", {}), ("selective", {"kv_budgets": [64, 64, 40, 2048]})],
    ids=str,
)
def test_compiled_at_startup(variant: str, parameters: dict[str, Any], tmp_path: Path) -> None:
    """Two passes and parts; accumulators; budgets, of which a builder is for layers of one."""
    overrides = {"attention_variant": {"name": variant, **parameters}}
    program = "tests.vllm_attn.compiled_at_startup"
    environment = os.environ | {
        "ATTNSERVE_TRITON_CONFIGS": str(tmp_path),
        "TRITON_CACHE_DIR": str(tmp_path / "triton"),
        "TRITON_INTERPRET": "0",
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_LOGGING_LEVEL": "INFO",
    }
    ran = subprocess.run(
        [
            *(sys.executable, "-m", program),
            *(str(CHECKPOINTS / variant), variant, json.dumps(overrides)),
        ],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr[-2000:]
    found = json.loads(ran.stdout.splitlines()[-1])
    assert found["startup"] >= 5
    assert found["load"] == []
    assert found["refused"].startswith(f"{tmp_path}/sm_90.json: no table of tiles") != bool(
        parameters
    )
    assert "Attention kernels took" in ran.stdout
