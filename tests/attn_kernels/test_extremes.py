"""Where formulas break: huge scores, empty and uniform rows, and their gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_kernels import Variant, attend, get_variant, reference
from tests.attn_kernels.cases import (
    CONFIGURATION_IDS,
    VARIANTS,
    Shape,
    by_paper_formula,
    causal,
    decode,
    make_given,
    make_inputs,
    penalties,
    seeded,
)

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=CONFIGURATION_IDS)
dtypes = pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)

ROWS = {
    "+200": [200.0] * 6,
    "-200": [-200.0] * 6,
    "+-200": [200.0, -200.0, 0.0, 200.0, 1.0, -200.0],
    "+700": [700.0] * 6,
    "-700": [-700.0] * 6,
    "+-700": [-700.0, 700.0, 0.0, 0.5, 700.0, -700.0],
    "rising to 700": [-700.0, -200.0, -1.0, 1.0, 200.0, 700.0],
    "falling to -700": [700.0, 200.0, 1.0, -1.0, -200.0, -700.0],
}


def with_scores(
    x: list[float], dtype: torch.dtype = torch.float64
) -> tuple[Tensor, Tensor, Tensor]:
    """q, k, v of two heads over one key-value head whose raw scores (scale 1) are x_j for every
    query of head 0 and -x_j for head 1."""
    k = torch.tensor([[[value, 0.0] for value in x]], dtype=dtype)
    q = torch.zeros(2, len(x), 2, dtype=dtype)
    q[0, :, 0], q[1, :, 0] = 1.0, -1.0
    v = torch.randn(1, len(x), 3, generator=seeded(30), dtype=torch.float64).to(dtype)
    return q, k, v


@pytest.mark.parametrize("x", ROWS.values(), ids=ROWS)
@every_variant
def test_reference_at_extreme_scores(variant: Variant, x: list[float]) -> None:
    """No nan, no inf, and the limit that the unshifted formula has in unbounded arithmetic."""
    q, k, v = with_scores(x)
    given = make_given(variant, 2, len(x), 31)
    got, _ = reference.attention(variant, q, k, v, scale=1.0, **given)
    stepwise, _ = decode(variant, q, k, v, scale=1.0, **given)
    _, want = by_paper_formula(variant, q, k, v, scale=1.0, **given)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(stepwise, want, rtol=1e-11, atol=1e-12)


@pytest.mark.parametrize("x", ROWS.values(), ids=ROWS)
@every_variant
def test_float32_attend_at_extreme_scores(variant: Variant, x: list[float]) -> None:
    q, k, v = with_scores(x, torch.float32)
    given = make_given(variant, 2, len(x), 31)
    out, weights = attend(
        variant,
        q,
        k,
        v,
        causal(len(x)),
        scale=1.0,
        learned={name: value.float() for name, value in given["learned"].items()},
        gates=given["gates"],
        penalty=penalties(variant, q, k, 1.0),
    )
    want_weights, want = by_paper_formula(
        variant, *(t.double() for t in (q, k, v)), scale=1.0, **given
    )
    torch.testing.assert_close(weights.double(), want_weights, rtol=0, atol=2e-4)
    torch.testing.assert_close(out.double(), want, rtol=0, atol=5e-4)


@pytest.mark.parametrize("low", [0.0, -1e-30, -1.0, -200.0, -700.0, -1e5], ids=str)
@dtypes
def test_softpick_is_zero_where_no_score_is_positive(low: float, dtype: torch.dtype) -> None:
    """With a running maximum that may start below 0, exp(-max) would overflow here."""
    x = [low, low, 3 * low, low]
    q, k, v = (t[:1] for t in with_scores(x, dtype))
    variant = get_variant("softpick")
    out, weights = attend(variant, q, k, v, causal(4), scale=1.0)
    assert (weights == 0).all() and (out == 0).all()
    output, _ = reference.attention(variant, q, k, v, scale=1.0)
    assert (output == 0).all()


def test_softpick_masked_keys_stay_out_of_the_denominator() -> None:
    q, k, v = (t[:1] for t in with_scores([1.0, 5.0, -5.0, 90.0]))
    variant = get_variant("softpick")
    mask = torch.tensor([[True, False, False, False]])
    _, weights = attend(variant, q[:, :1], k, v, mask, scale=1.0)
    _, alone = attend(variant, q[:, :1], k[:, :1], v[:, :1], mask[:, :1], scale=1.0)
    assert weights[0, 0].tolist() == [alone.item(), 0.0, 0.0, 0.0]


def identical_keys(
    length: int, head_size: int, dtype: torch.dtype, direction: str
) -> tuple[Tensor, Tensor]:
    """q `[2, length, d]` and k `[1, length, d]`, all keys the same; the queries are random, along
    the key or against it (where softplus is tiny)."""
    g = seeded(32)
    key = torch.randn(head_size, generator=g, dtype=torch.float64)
    q = torch.randn(2, length, head_size, generator=g, dtype=torch.float64)
    if direction != "random":
        q = key.expand(2, length, head_size) * {"along": 1.7, "against": -1.7}[direction]
    return q.to(dtype), key.to(dtype).expand(1, length, head_size).contiguous()


@pytest.mark.parametrize("direction", ["random", "along", "against"])
@pytest.mark.parametrize(
    ("length", "head_size"), [(1, 8), (2, 8), (3, 8), (4, 8), (5, 3), (17, 16), (333, 64), (900, 5)]
)
@pytest.mark.parametrize("power", [1.0, 3.0, 15.0])
@dtypes
def test_lssar_uniform_rows(
    dtype: torch.dtype, power: float, length: int, head_size: int, direction: str
) -> None:
    """All keys identical: every row is uniform, at every length, not 0/0 and not noise."""
    variant = get_variant("lssar", power=power)
    q, k = identical_keys(length, head_size, dtype, direction)
    mask = causal(length)
    _, weights = attend(variant, q, k, k, mask)
    want = (mask / mask.sum(-1, keepdim=True)).to(dtype).expand_as(weights)
    torch.testing.assert_close(weights, want, rtol=1e-5, atol=0)
    last, _ = attend(variant, q[:, -1:], k, k, mask[-1:])
    torch.testing.assert_close(last, k[:, -1:].expand_as(last), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["lssa", "lssar"])
@dtypes
def test_zero_query_is_uniform(name: str, dtype: torch.dtype) -> None:
    k = torch.randn(1, 9, 4, generator=seeded(33), dtype=torch.float64).to(dtype)
    _, weights = attend(get_variant(name), torch.zeros_like(k), k, k, causal(9))
    want = (causal(9) / causal(9).sum(-1, keepdim=True)).to(dtype)
    torch.testing.assert_close(weights[0], want)


def test_lssar_almost_uniform_row_is_not_flattened() -> None:
    """A spread of 1e-7 is far above float64's rounding: the top key takes the weight."""
    q = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    angle = torch.tensor([0.5, 0.5, 0.5, 0.5 - 1e-7, 0.5, 0.5], dtype=torch.float64)
    k = torch.stack((angle.cos(), angle.sin()), -1)[None]
    _, weights = attend(get_variant("lssar"), q, k, k, torch.ones(1, 6, dtype=torch.bool))
    torch.testing.assert_close(
        weights[0, 0], torch.tensor([0.0, 0, 0, 1, 0, 0], dtype=torch.float64), rtol=0, atol=1e-6
    )


def gradients(
    variant: Variant,
    tensors: tuple[Tensor, Tensor, Tensor],
    mask: Tensor,
    given: dict[str, Any],
    scale: float | None = None,
) -> list[Tensor]:
    """Gradients of a random projection of the output with respect to q, k, v, gates and learned
    tensors."""
    q, k, v = (t.detach().clone().requires_grad_() for t in tensors)
    learned = {name: t.to(q.dtype).requires_grad_() for name, t in given["learned"].items()}
    gates = given["gates"]
    gates = None if gates is None else gates.to(q.dtype).requires_grad_()
    factor = q.shape[-1] ** -0.5 if scale is None else scale
    penalty = penalties(variant, q, k, factor)
    out, _ = attend(
        variant, q, k, v, mask, scale=scale, learned=learned, penalty=penalty, gates=gates
    )
    probe = torch.randn(out.shape, generator=seeded(34), dtype=torch.float64).to(out.dtype)
    wanted = [q, k, v, *learned.values(), *([] if gates is None else [gates])]
    found = torch.autograd.grad((out * probe).sum(), wanted, allow_unused=True)
    return [torch.zeros_like(t) if g is None else g for t, g in zip(wanted, found, strict=True)]


def assert_finite(found: list[Tensor]) -> None:
    assert all(g.isfinite().all() for g in found)


@dtypes
@every_variant
def test_gradients_at_rows_that_see_no_key(variant: Variant, dtype: torch.dtype) -> None:
    inputs = make_inputs(variant, Shape(4, 2, 0, 7, 7, 4, 4), seed=35)
    mask = causal(7)
    mask[[0, 4]] = False
    q, k, v = (t.to(dtype) for t in inputs.qkv)
    found = gradients(variant, (q, k, v), mask, inputs.given())
    assert_finite(found)
    # Head 0's queries also act through the penalties of a stateful variant.
    heads = slice(1, None) if variant.stateful else slice(None)
    assert (found[0][heads, [0, 4]] == 0).all()
    nothing = torch.zeros(7, 7, dtype=torch.bool)
    for g in gradients(variant, (q, k, v), nothing, inputs.given()):
        assert (g == 0).all()


@pytest.mark.parametrize("x", [*ROWS.values(), [0.0] * 6], ids=[*ROWS, "0"])
@dtypes
@every_variant
def test_gradients_at_extreme_scores(variant: Variant, dtype: torch.dtype, x: list[float]) -> None:
    """In "rising to 700", masked scores lie far above the visible ones."""
    given = make_given(variant, 2, 6, 36)
    assert_finite(gradients(variant, with_scores(x, dtype), causal(6), given, scale=1.0))


@pytest.mark.parametrize("direction", ["random", "along", "against"])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 17, 65])
@dtypes
@every_variant
def test_gradients_where_all_keys_are_identical(
    variant: Variant, dtype: torch.dtype, length: int, direction: str
) -> None:
    q, k = identical_keys(length, 16, dtype, direction)
    v = torch.randn(1, length, 4, generator=seeded(37), dtype=torch.float64).to(dtype)
    given = make_given(variant, 2, length, 38)
    assert_finite(gradients(variant, (q, k, v), causal(length), given))


@dtypes
@every_variant
def test_gradients_at_zero_queries_and_keys(variant: Variant, dtype: torch.dtype) -> None:
    zero = torch.zeros(2, 6, 4, dtype=dtype)
    given = make_given(variant, 2, 6, 39)
    assert_finite(gradients(variant, (zero, zero, zero), causal(6), given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs_are_refused(dtype: torch.dtype) -> None:
    """257 keys are 256 in bfloat16: a length that a formula uses must not be rounded."""
    x = torch.zeros(1, 1, 8, dtype=dtype)
    with pytest.raises(TypeError, match="convert q, k and v"):
        attend(get_variant("ssmax", scale=1.0), x, x, x, torch.ones(1, 1, 1, dtype=torch.bool))
