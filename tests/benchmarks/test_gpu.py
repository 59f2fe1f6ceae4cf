"""`python -m benchmarks.gpu` without a GPU: one tiny case in Triton's interpreter."""

from __future__ import annotations

import importlib.util
import inspect
import json
import math
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from attn_kernels import get_variant
from benchmarks import gpu, gpu_peers, gpu_reference
from benchmarks.gpu_training import gpu_training
from benchmarks.kernels.case import Case, Inputs, Paging
from benchmarks.kernels.check import Expected
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


def test_unknown_peers_are_one_line(commands: Commands) -> None:
    said = commands.refused(gpu.gpu, "--device=cpu", "--peers", "FlashAttention", "cuDNN")
    assert "--peers cuDNN: there are FlashAttention, vLLM FlashAttention" in said


@pytest.mark.parametrize("name", ["softpick", "lssar", "selective", "forgetting"])
@pytest.mark.parametrize(
    "case",
    [
        Case("decode", "fp32", 16, 29, 3, 1, 4, 2, 16),
        Case("prefill", "fp32", 16, 13, 2, 31, 4, 2, 16),
    ],
    ids=str,
)
@pytest.mark.parametrize("scores", [1, 1000, gpu_reference.SCORES])
def test_the_reference_in_pieces(name: str, case: Case, scores: int) -> None:
    """All outputs, from as few as one query at a time, are those of single queries."""
    torch.manual_seed(0)
    variant = get_variant(name)
    inputs = Inputs.make(case)
    learned = {key: torch.rand(case.num_heads) for key in variant.learned}
    found = gpu_reference.expected(variant, inputs, learned, scores)
    few = Expected.of(variant, inputs, learned)
    assert few.error(found) < 1e-13
    sizes = [len(x) for _, x in gpu_reference.pieces(variant, inputs, learned, scores)]
    assert sum(sizes) == len(inputs.query)
    largest = max(1, scores // (case.num_heads * case.seq_len))
    assert max(sizes) == min(largest, case.new_tokens)


def test_an_error_behind_a_long_context_shows() -> None:
    """Where outputs are small beside those of the first tokens."""
    case = Case("prefill", "fp32", 16, 0, 1, 500, 2, 1, 16)
    torch.manual_seed(0)
    inputs = replace(Inputs.make(case), query=torch.zeros(500, 2, 16))  # equal weights
    wanted = gpu_reference.expected(get_variant("softmax"), inputs, {})
    out = wanted.float()
    peer = gpu_peers.softmax(lambda: out)
    assert gpu_reference.error_of(peer, inputs, wanted) < 1e-6
    out[-1] *= 1.02
    assert gpu_reference.error_of(peer, inputs, wanted) == pytest.approx(0.02, rel=1e-3)
    assert float((out - wanted).abs().max() / wanted.abs().max()) < 2e-3
    out[7, 1, 3] = torch.nan
    assert math.isnan(gpu_reference.error_of(peer, inputs, wanted))


@pytest.mark.parametrize(
    ("capability", "built", "version"), [(9, (2, 3), 3), (9, (2,), 2), (8, (2, 3), 2)]
)
def test_flash_attention_is_the_one_that_vllm_serves_with(
    capability: int, built: tuple[int, ...], version: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of Hopper 3, if it is built, else 2; the call is one that vLLM's function takes."""
    import vllm
    from vllm.v1.attention.backends import fa_utils

    # vLLM's CPU build has the file, and not the compiled operators that its package wants.
    path = Path(vllm.__file__).parent / "vllm_flash_attn/flash_attn_interface.py"
    spec = importlib.util.spec_from_file_location("vllm.vllm_flash_attn", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    vars(module)["flash_attn_interface"] = module
    for name in (spec.name, f"{spec.name}.flash_attn_interface"):
        monkeypatch.setitem(sys.modules, name, module)
    spec.loader.exec_module(module)
    calls: list[dict[str, Any]] = []
    signature = inspect.signature(module.flash_attn_varlen_func)
    platform = SimpleNamespace(
        is_xpu=lambda: False,
        is_rocm=lambda: False,
        get_device_capability=lambda: SimpleNamespace(major=capability),
    )
    monkeypatch.setattr(fa_utils, "current_platform", platform)
    monkeypatch.setattr(module, "is_fa_version_supported", lambda wanted: wanted in built)
    monkeypatch.setattr(
        gpu_peers,
        "of_vllm",
        lambda *_: lambda *given, **named: calls.append(signature.bind(*given, **named).arguments),
    )
    case = Case("decode", "fp32", 16, 29, 3, 1, 4, 2, 16)
    inputs = Inputs.make(case)
    gpu_peers.vllm_flash_attention(inputs, Paging(case, 1)).run()
    assert calls[0]["fa_version"] == version


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
