"""`python -m benchmarks.gpu` without a GPU: one tiny case in Triton's interpreter."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from benchmarks import gpu, gpu_peers
from benchmarks.gpu_training import gpu_training
from benchmarks.kernels.case import Inputs, Paging
from tests.conftest import Commands


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are imported from now on are interpreted."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def sdpa(factor: float) -> Callable[[Inputs, Paging], gpu_peers.Peer]:
    """Return a kernel of others whose output is multiplied by a factor."""

    def make(inputs: Inputs, paging: Paging) -> gpu_peers.Peer:
        keys, values = gpu_peers.paged(inputs, paging)
        assert keys.shape == values.shape == (paging.num_blocks, 16, 2, 32)
        assert torch.equal(keys.flatten(0, 1)[paging.slots(0, 0)], inputs.key.flatten(0, 1))
        query = inputs.query[:, :, None]
        key, value = inputs.key.transpose(1, 2), inputs.value.transpose(1, 2)
        return gpu_peers.softmax(
            lambda: (
                factor * scaled_dot_product_attention(query, key, value, enable_gqa=True)[:, :, 0]
            )
        )

    return make


def test_times_what_is_right_and_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commands: Commands
) -> None:
    others: dict[str, Any] = {
        name: gpu_peers.PEERS[name] for name in ("FlashAttention", "vLLM Triton", "FlexAttention")
    }
    peers = {**others, "same": sdpa(1.0), "wrong": sdpa(1.1)}
    for module in (gpu, gpu_peers):
        monkeypatch.setattr(module, "PEERS", peers)
    csv = tmp_path / "gpu.csv"
    arguments = ["--device=cpu", "--variants", "softmax", f"--csv={csv}", "--json"]
    found = json.loads(commands.run(gpu.gpu, *arguments, code=1))
    rows = {row["kernel"]: row for row in found["rows"]}
    mine = rows["softmax"]
    assert mine["note"] == ""
    assert 0 < mine["us_p20"] <= mine["us_median"] <= mine["us_p80"]
    assert mine["ratio_same"] > 0 and mine["kv_gb_per_s"] > 0 and mine["ratio_wrong"] is None
    assert {rows[name]["status"] for name in others} == {"skipped"}
    assert "flash_attn is not installed" in rows["FlashAttention"]["note"]
    assert rows["wrong"]["status"] == "failed"
    assert "against the reference" in rows["wrong"]["note"]

    written = csv.read_text()
    again = json.loads(commands.run(gpu.gpu, *arguments, code=1))
    assert "taken from" in commands.printed.err and csv.read_text() == written
    kept = {row["kernel"]: row for row in again["rows"]}
    assert kept["softmax"]["us_median"] == pytest.approx(mine["us_median"], rel=1e-5)
    assert kept["wrong"]["us_median"] is None

    late = commands.run(gpu.gpu, *arguments[:-1], "--minutes=0", "--seed=1")
    assert late.strip() == "nothing was measured"
    assert "out of time, run again for: decode fp32" in commands.printed.err


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="it is the refusal of a machine without a GPU, and here is one",
)
def test_no_gpu_is_one_line(commands: Commands) -> None:
    assert "finds no GPU; in an environment with CUDA's torch" in commands.refused(gpu.gpu)


def test_training_in_the_interpreter(commands: Commands) -> None:
    """Every column is there, of a variant and of torch's attention."""
    arguments = ("--device", "cpu", "--variants", "softpick", "--no-save", "--json")
    found = json.loads(commands.run(gpu_training, *arguments))
    ours, theirs = found["rows"]
    assert (ours["kernel"], theirs["kernel"], ours["note"]) == ("softpick", "sdpa", "")
    assert ours["us_median"] > ours["us_forward_median"] > 0
    assert theirs["ratio_sdpa"] == 1.0 and ours["ratio_flex_attention"] is None
    assert ours["tflops"] > 0
