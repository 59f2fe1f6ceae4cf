"""HQQ and GPTQ against what their papers minimise."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from torch import Tensor

from attn_kernels import variant_names
from attnserve.errors import UserError
from attnserve.evaluation.scorers import load
from quant.model import linears, observe, quantize
from quant.schemes.gptq import DAMPING, gptq
from quant.schemes.hessian import layer_by_layer
from quant.schemes.hqq import P, hqq
from quant.schemes.registry import SCHEMES, get_scheme
from quant.schemes.rtn import rtn
from quant_kernels.weight import BITS, QuantizedWeight, QuantSpec
from tests.tiny import tiny_checkpoint


def objective(weight: Tensor, quantized: QuantizedWeight) -> Tensor:
    """Return what `hqq` minimises, for each row and group, in steps: `[rows, groups]`."""
    error = quantized.spec.grouped(weight - quantized.dequantize())
    return (error / quantized.scales.float()[..., None]).abs().pow(P).sum(-1)


def correlated(rows: int, columns: int) -> Tensor:
    """Return inputs whose columns go together, `[rows, columns]`."""
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(columns, columns, generator=generator)
    return torch.randn(rows, columns, generator=generator) @ mix / columns**0.5


def cost(weight: Tensor, quantized: QuantizedWeight, inputs: Tensor) -> float:
    """Return what GPTQ minimises: the squared error of the layer's output."""
    return float(((weight - quantized.dequantize()) @ inputs.T).square().sum())


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [32, 64, None])
@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_beats_rounding(bits: int, size: int | None, act_order: bool) -> None:
    weight = torch.randn(24, 160, generator=torch.manual_seed(1))
    inputs = correlated(400, 160)
    for symmetric in (False, True):
        spec = QuantSpec(bits, size, symmetric)
        found = gptq(weight, spec, inputs.T @ inputs, act_order)
        assert cost(weight, found, inputs) < 0.8 * cost(weight, rtn(weight, spec), inputs)


@pytest.mark.parametrize("act_order", [False, True])
def test_gptq_rounds_where_inputs_are_independent(act_order: bool) -> None:
    weight = torch.randn(8, 150, generator=torch.manual_seed(1))
    for spec in (QuantSpec(3, 64), QuantSpec(2, None, True)):
        found, plain = gptq(weight, spec, 7.0 * torch.eye(150), act_order), rtn(weight, spec)
        assert torch.equal(found.values, plain.values) and torch.equal(found.scales, plain.scales)


def test_gptq_is_the_papers_one_column_at_a_time() -> None:
    """Optimal brain quantization's own step, in float64 with an inverse for every column, with
    one group and a matrix of more than a block."""
    weight = torch.randn(5, 150, generator=torch.manual_seed(1))
    inputs = correlated(600, 150)
    hessian, spec = inputs.T @ inputs, QuantSpec(4, None)
    found = gptq(weight, spec, hessian)
    scales, zeros = spec.qparams(weight)
    left = weight.double()
    damped = hessian.double() + DAMPING * hessian.double().diagonal().mean() * torch.eye(150)
    for column in range(150):
        inverse = damped[column:, column:].inverse()
        code = spec.quantize(left[:, column : column + 1].float(), scales, zeros)
        assert zeros is not None
        back = (code.double() - zeros) * scales.double()
        error = (left[:, column : column + 1] - back) / inverse[0, 0]
        left[:, column:] -= error * inverse[0]
        left[:, column] = back[:, 0]
    same = (found.dequantize() - left.float()).abs() < 1e-4
    assert same.double().mean() > 0.99  # a value between two may go either way


def test_gptq_without_inputs_of_a_column() -> None:
    inputs = correlated(300, 64)
    inputs[:, 5] = 0
    weight = torch.randn(4, 64, generator=torch.manual_seed(1))
    found = gptq(weight, QuantSpec(4, 32), inputs.T @ inputs)
    assert (found.dequantize()[:, 5] == 0).all()
    assert cost(weight, found, inputs) < cost(weight, rtn(weight, QuantSpec(4, 32)), inputs)


@settings(max_examples=60, deadline=None)
@given(
    arrays(np.float32, (3, 50), elements=st.floats(-100, 100, width=32, allow_subnormal=False)),
    st.sampled_from(BITS),
    st.sampled_from([None, 8, 32]),
)
def test_hqq_is_never_worse_in_its_objective(matrix: Any, bits: int, size: int | None) -> None:
    weight, spec = torch.from_numpy(matrix), QuantSpec(bits, size)
    found, plain = objective(weight, hqq(weight, spec)), objective(weight, rtn(weight, spec))
    assert (found <= plain * (1 + 1e-3) + 1e-2).all()


def test_hqq_is_better_on_weights() -> None:
    weight = torch.randn(64, 688, generator=torch.manual_seed(1))
    for bits in BITS:
        found = hqq(weight, QuantSpec(bits, 64))
        assert found.zeros is not None and found.zeros.dtype == torch.float16
        plain = objective(weight, rtn(weight, found.spec)).sum()
        assert objective(weight, found).sum() < (0.96 if bits <= 4 else 1) * plain


@pytest.mark.parametrize("variant", variant_names())
def test_hessians_are_of_the_quantized_models_inputs(variant: str, tmp_path: Any) -> None:
    """Against a whole forward pass for every decoder layer, with what is before it quantized."""
    model = load(tiny_checkpoint(tmp_path / variant, variant, num_hidden_layers=2))
    texts = torch.randint(0, model.config.vocab_size, (3, 20), generator=torch.manual_seed(0))
    layers = linears(model, lm_head=True)
    assert "lm_head" in layers and "lm_head" not in linears(model)
    found: dict[str, Tensor] = {}

    def replace(name: str, hessian: Tensor) -> None:
        found[name] = hessian
        layers[name].weight.data = layers[name].weight.data * 0.9  # as if quantized

    layer_by_layer(model, layers, texts, replace)
    assert list(found) == list(layers)
    check = load(tmp_path / variant)
    own = linears(check, lm_head=True)
    for start in ("model.layers.0", "model.layers.1", "lm_head"):
        seen: dict[str, Tensor] = {}
        chosen = {name: layer for name, layer in own.items() if name.startswith(start)}
        observe(check, chosen, texts, partial(keep, seen))
        for name, inputs in seen.items():
            torch.testing.assert_close(found[name], inputs.T @ inputs / len(inputs))
            own[name].weight.data = own[name].weight.data * 0.9


def keep(seen: dict[str, Tensor], name: str, inputs: Tensor) -> None:
    """Collect a layer's inputs of all texts."""
    seen[name] = torch.cat((seen[name], inputs)) if name in seen else inputs


OWN = [name for name, s in SCHEMES.items() if s.library is None]


@pytest.mark.parametrize("scheme", OWN)
def test_quantize_replaces_weights_and_nothing_else(scheme: str, softpick: Any) -> None:
    model, before = load(softpick), load(softpick)
    texts = torch.randint(0, model.config.vocab_size, (2, 20), generator=torch.manual_seed(0))
    found = quantize(model, get_scheme(scheme), QuantSpec(4, 48), texts)
    assert list(found) == list(linears(before))
    old = dict(before.named_parameters())
    for name, parameter in model.named_parameters():
        layer = name.removesuffix(".weight")
        expected = found[layer].dequantize() if layer in found else old[name]
        assert torch.equal(parameter, expected)


@pytest.mark.parametrize(
    ("scheme", "spec", "columns", "message"),
    [
        ("hqq", QuantSpec(4, 64, True), {64}, "hqq has no symmetric form: leave out --symmetric"),
        (
            "compressed-tensors",
            QuantSpec(4, 64),
            {128, 688},
            "cannot cut 688 columns into groups of 64: use --group-sizes channel or a divisor",
        ),
    ],
)
def test_refusals(scheme: str, spec: QuantSpec, columns: set[int], message: str) -> None:
    with pytest.raises(UserError, match=message):
        get_scheme(scheme).check(spec, columns)


def test_unknown_scheme() -> None:
    with pytest.raises(UserError, match="unknown scheme 'awq': use one of rtn, hqq, gptq"):
        get_scheme("awq")
