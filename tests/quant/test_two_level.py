"""Two-level scales, searched ranges, and bits by a budget."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from attnserve.errors import UserError
from attnserve.evaluation.texts import Text
from quant.budget import candidates, check_reach, packed_bytes, spend, units_of
from quant.model import empty_model, linears
from quant.options import AUTO
from quant.schemes import two_level as module
from quant.schemes.gptq import damped, gptq
from quant.schemes.registry import get_scheme
from quant.schemes.search import search_qparams
from quant.schemes.two_level import improve, two_level
from quant_kernels.levels import scales_of, zeros_of
from quant_kernels.weight import QuantizedWeight, QuantSpec
from tests.quant.test_schemes import correlated, cost

WEIGHT = torch.randn(24, 168, generator=torch.manual_seed(1))
INPUTS = correlated(400, 168)
HESSIAN = INPUTS.T @ INPUTS / 400


@pytest.mark.parametrize(("bits", "size"), [(2, 16), (3, 32), (4, 32)])
def test_less_error_than_gptq_at_fewer_bits(bits: int, size: int) -> None:
    """Against GPTQ as published in groups of 32, which takes more memory."""
    found = two_level(WEIGHT, QuantSpec(bits, size), HESSIAN)
    plain = gptq(WEIGHT, QuantSpec(bits, 32), HESSIAN)
    assert found.packed_bytes <= plain.packed_bytes
    assert cost(WEIGHT, found, INPUTS) < 0.9 * cost(WEIGHT, plain, INPUTS)


def test_what_is_stored() -> None:
    """Scales of rows, a byte a group, and zeros where rows or groups are zeros."""
    weight = WEIGHT.clone()
    weight[3] = 0
    weight[5, :16] = 0
    found = two_level(weight, QuantSpec(2, 16), HESSIAN)
    assert found.scales.shape == (24, 1) and found.levels.shape == (24, 11)
    matrix, scales = found.dequantize(), scales_of(found.levels, found.scales)
    assert (matrix[3].abs() < 1e-6).all()
    zeros = zeros_of(found.levels, 2)
    steps = (found.values[:, 32:48] - zeros[:, 2:3]) * scales[:, 2:3]
    assert torch.equal(matrix[:, 32:48], steps)
    # One group of zeros does not make the other groups' steps coarse.
    assert float(found.scales[5]) < 3 * float(found.scales[4])


def test_descent_never_loses(monkeypatch: pytest.MonkeyPatch) -> None:
    hessian = damped(HESSIAN).float()
    monkeypatch.setattr(module, "SWEEPS", 0)
    found = two_level(WEIGHT, QuantSpec(2, 16), HESSIAN)

    def error() -> float:
        difference = found.dequantize() - WEIGHT
        return float((difference @ hessian * difference).sum())

    errors = [error()]
    monkeypatch.setattr(module, "SWEEPS", 1)
    for _ in range(4):
        improve(WEIGHT, found, hessian)
        errors.append(error())
    assert errors == sorted(errors, reverse=True) and errors[1] < 0.95 * errors[0]


@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize("bits", [2, 4, 8])
def test_search_is_never_worse(bits: int, symmetric: bool) -> None:
    """In the weighted squared error, group by group; much better with few bits."""
    spec = QuantSpec(bits, 64, symmetric)
    importance = torch.rand(168, generator=torch.manual_seed(2)) + 0.1

    def error(scales: torch.Tensor, zeros: torch.Tensor | None) -> torch.Tensor:
        each = [spec.expand(part, 168) for part in (scales, zeros) if part is not None]
        points = each[1] if zeros is not None else None
        made = QuantizedWeight(spec.quantize(WEIGHT, each[0], points), scales, zeros, spec)
        return spec.grouped((made.dequantize() - WEIGHT).square() * importance).sum(-1)

    found, plain = error(*search_qparams(WEIGHT, importance, spec)), error(*spec.qparams(WEIGHT))
    assert (found <= plain * 1.001).all()
    assert bits > 2 or found.sum() < 0.8 * plain.sum()


def test_units() -> None:
    """Layers that vLLM fuses have one width."""
    names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    layers = [f"model.layers.{layer}.{name}" for layer in (0, 1) for name in names]
    units = units_of(layers)
    assert [len(own) for own in units.values()] == [3, 1, 2, 1] * 2
    assert [layer for own in units.values() for layer in own] == layers


def test_candidates() -> None:
    scheme = get_scheme("two-level")
    assert QuantSpec(2, 16) in candidates(scheme, 2.5, AUTO)
    assert {spec.group_size for spec in candidates(scheme, 3.5, 32)} == {32}
    assert {spec.group_size for spec in candidates(get_scheme("gptq"), 4, AUTO)} == {64}


@pytest.mark.parametrize("name", ["two-level", "gptq"])
@pytest.mark.parametrize("spec", [QuantSpec(2, 16), QuantSpec(3, 32), QuantSpec(5, 64)], ids=str)
def test_bytes_are_known_by_the_shape(name: str, spec: QuantSpec) -> None:
    scheme, layer = get_scheme(name), nn.Linear(168, 24)
    made = scheme(layer.weight.data, spec, HESSIAN)
    assert packed_bytes(scheme, spec, layer) == made.packed_bytes


def test_what_is_said_to_be_possible_is(softpick: Path) -> None:
    scheme, model = get_scheme("two-level"), empty_model(softpick)
    widths = candidates(scheme, 2.5, AUTO)
    with pytest.raises(UserError, match=r"2\.1: the least possible is 2\.24"):
        check_reach(scheme, widths, 2.1, model)
    check_reach(scheme, widths, 2.24, model)


def test_a_budget_is_kept(softpick: Path) -> None:
    """What is chosen fits, uses most of the budget, and is not the same everywhere."""
    rows = torch.randint(2, 256, (2, 40), generator=torch.manual_seed(0)).tolist()
    text = Text("numbers", 1, rows)
    scheme, specs = get_scheme("two-level"), [QuantSpec(2, 64), QuantSpec(2, 16), QuantSpec(4, 32)]
    chosen = spend(softpick, scheme, {}, specs, 3.0, text, text)
    layers = linears(empty_model(softpick))
    assert set(chosen) == set(layers) and len(set(chosen.values())) > 1
    used = sum(
        layers[name].weight.numel() * (spec.bits + 8 / (spec.group_size or 1))
        for name, spec in chosen.items()
    )
    assert 2.5 < used / sum(layer.weight.numel() for layer in layers.values()) < 3.0
