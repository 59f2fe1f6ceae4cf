"""`python -m benchmarks.gpu_packed` without a GPU: two tiny cases in Triton's interpreter."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any
from unittest.mock import create_autospec

import pytest
import torch
from torch import Tensor

from benchmarks import gpu_packed
from quant_kernels.weight import QuantizedWeight
from tests.conftest import Commands


@pytest.fixture(autouse=True)
def interpreted(monkeypatch: pytest.MonkeyPatch) -> None:
    """Kernels that are imported from now on are interpreted; weights are made anew."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    gpu_packed.products.cache_clear()


def wrong(weight: QuantizedWeight, device: str, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    """Return a product that is wrong by a tenth."""
    multiply = gpu_packed.dense(weight, device, dtype)
    return lambda x: 1.1 * multiply(x)


def test_times_what_is_right(monkeypatch: pytest.MonkeyPatch, commands: Commands) -> None:
    monkeypatch.setitem(gpu_packed.MAKERS, "wrong", wrong)
    found = json.loads(
        commands.run(gpu_packed.gpu_packed, "--device=cpu", "--no-save", "--json", code=1)
    )
    assert len(found["rows"]) == 2 * 4
    for case in ("64x256 symmetric 3 rows", "64x256 asymmetric 3 rows"):
        rows = {row["kernel"]: row for row in found["rows"] if row["case"] == case}
        mine = rows["packed"]
        assert mine["status"] == "ok" and mine["error"] < gpu_packed.LIMIT
        assert 0 < mine["us_p20"] <= mine["us_median"] <= mine["us_p80"]
        assert mine["ratio_torch"] > 0 and mine["ratio_vLLM Marlin"] is None
        assert mine["weight_gb_per_s"] > 0 and rows["torch"]["weight_gb_per_s"] is None
        assert rows["vLLM Marlin"]["status"] == "skipped"
        assert "vLLM for CUDA is not installed" in rows["vLLM Marlin"]["note"]
        assert rows["wrong"]["status"] == "failed" and rows["wrong"]["us_median"] is None
        assert "against the float64 product" in rows["wrong"]["note"]


@pytest.mark.parametrize("symmetric", [True, False])
def test_marlin_is_called_as_vllm_declares_it(
    symmetric: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its kernels need a GPU, so they are replaced here, by functions with their parameters; the
    order of scales and zero points is vLLM's own."""
    ops = pytest.importorskip("vllm._custom_ops")
    utils = pytest.importorskip("vllm.model_executor.layers.quantization.utils.marlin_utils")
    calls: dict[str, Any] = {}
    for module, name in (
        (ops, "gptq_marlin_repack"),
        (utils, "get_marlin_workspace"),
        (utils, "apply_gptq_marlin_linear"),
    ):
        calls[name] = create_autospec(getattr(module, name), return_value=torch.zeros(3))
        monkeypatch.setattr(module, name, calls[name])
    monkeypatch.setattr(gpu_packed, "require_cuda_vllm", lambda device: None)
    weight = gpu_packed.random_weight(128, 256, symmetric)
    x = torch.randn(3, 256).bfloat16()
    gpu_packed.marlin(weight, "cpu", torch.bfloat16)(x)
    (words,) = calls["gptq_marlin_repack"].call_args.args
    assert words.shape == (256 // 8, 128)
    values = torch.stack([words >> 4 * i & 15 for i in range(8)], 1).flatten(0, 1)
    assert torch.equal(values.T, weight.values.int())
    assert calls["apply_gptq_marlin_linear"].call_args.args == (x,)
    given = calls["apply_gptq_marlin_linear"].call_args.kwargs
    assert given["weight_scale"].shape == (2, 128)
    assert torch.equal(given["weight_scale"].flatten().sort()[0], weight.scales.flatten().sort()[0])
    assert given["weight_zp"].numel() == (0 if symmetric else 2 * 128 // 8)
    assert given["wtype"].size_bits == 4 and given["wtype"].has_bias() == symmetric


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="it is the refusal of a machine without a GPU, and here is one",
)
def test_no_gpu_is_one_line(commands: Commands) -> None:
    assert "finds no GPU" in commands.refused(gpu_packed.gpu_packed)


def test_bytes_and_operations() -> None:
    symmetric, other = (
        functools.partial(gpu_packed.Case, 64, 256, kind)(3) for kind in (True, False)
    )
    assert symmetric.weight_bytes == 64 * 256 / 2 + 64 * 2 * 2
    assert other.weight_bytes == symmetric.weight_bytes + 64 * 2
    assert symmetric.flops == 2 * 3 * 64 * 256
