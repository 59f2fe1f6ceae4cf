"""The papers' own vectors, and the float64 reference against the papers' formulas row by row."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from attn_kernels import (
    Rows,
    Variant,
    attend,
    causal_mask,
    get_variant,
    reference,
    variant_names,
)
from tests.attn_kernels import paper_formulas
from tests.attn_kernels.cases import (
    CONFIGURATION_IDS,
    SHAPES,
    VARIANTS,
    Shape,
    by_paper_formula,
    causal,
    make_inputs,
    penalties,
    seeded,
)


def row(variant: Variant, x: list[float], **learned: float) -> Tensor:
    """Return the weights of one query whose raw scores over its visible keys are x."""
    q = torch.tensor([[[1.0, 0.0]]], dtype=torch.float64)
    k = torch.tensor([[[value, 0.0] for value in x]], dtype=torch.float64)
    _, weights = attend(
        variant,
        q,
        k,
        k,
        torch.ones(1, len(x), dtype=torch.bool),
        scale=1.0,
        learned={name: q.new_tensor([value]) for name, value in learned.items()},
    )
    return weights[0, 0]


def assert_weights(
    got: Tensor, want: list[float], rtol: float = 1e-14, atol: float = 1e-15
) -> None:
    torch.testing.assert_close(got, torch.tensor(want, dtype=got.dtype), rtol=rtol, atol=atol)


@pytest.mark.parametrize("name", variant_names())
def test_every_variant_has_a_paper_formula(name: str) -> None:
    assert callable(paper_formulas.entry(name).weights)


def test_missing_paper_formula_says_what_to_do() -> None:
    with pytest.raises(AssertionError, match=r"'novel' has no paper formula: .*FORMULAS"):
        paper_formulas.entry("novel")


def test_softmax_vector() -> None:
    e = math.e
    assert_weights(row(get_variant("softmax"), [1.0, 0.0]), [e / (e + 1), 1 / (e + 1)])


def test_softpick_vector() -> None:
    got = row(get_variant("softpick"), [1.0, 0.0, -1.0])
    assert_weights(got, [0.73106, 0.0, 0.0], rtol=0, atol=5e-6)
    assert got[1] == got[2] == 0
    positive, negative = math.e - 1, 1 - 1 / math.e
    assert_weights(got[:1], [positive / (positive + negative + 1e-6 * math.e)])


def test_softpick_keeps_the_precision_of_tiny_scores() -> None:
    assert_weights(row(get_variant("softpick"), [1e-13]), [1e-13 / 1e-6], rtol=1e-6, atol=0)


def test_ssmax_vector() -> None:
    want = [4 / 7, 1 / 7, 1 / 7, 1 / 7]
    assert_weights(row(get_variant("ssmax"), [1.0, 0.0, 0.0, 0.0], ssmax_scale=1.0), want)
    assert_weights(row(get_variant("ssmax", scale=1.0), [1.0, 0.0, 0.0, 0.0]), want)


def test_ssmax_bias_is_a_temperature_that_ignores_the_length() -> None:
    variant = get_variant("ssmax", bias=True)
    got = row(variant, [1.0, 0.0, 0.0, 0.0], ssmax_scale=0.0, ssmax_bias=math.log(4))
    assert_weights(got, [4 / 7, 1 / 7, 1 / 7, 1 / 7])


@pytest.mark.parametrize("x", [3.0, 0.0, -5.0])
def test_ssmax_single_key_has_weight_one(x: float) -> None:
    assert_weights(row(get_variant("ssmax"), [x], ssmax_scale=1.7), [1.0])


def test_lssa_argument_is_bounded() -> None:
    """At most ln(d) ln(N), 37.5 at d 64 and N 8192, however long the vectors are."""
    n, d = 8192, 64
    q = torch.randn(1, 3, d, generator=seeded(0), dtype=torch.float64) * 1e6
    rows = Rows.of(torch.ones(3, n, dtype=torch.bool), {}, torch.float64)
    transformed, key = get_variant("lssa").transform(q, q, rows)
    bound = math.log(d) * math.log(n)
    scores = transformed @ key.mT
    assert bound == pytest.approx(37.5, abs=0.05)
    assert scores.abs().max() <= bound * (1 + 1e-12)
    assert scores.max() == pytest.approx(bound, rel=1e-12)


def test_lssa_vector() -> None:
    """d = 2, N = 2, cosines 1 and -1."""
    x = math.log(2) ** 2
    a, b = math.log1p(math.exp(x)), math.log1p(math.exp(-x))
    assert_weights(row(get_variant("lssa"), [5.0, -3.0]), [a / (a + b), b / (a + b)])


def test_lssa_softplus_is_exact_for_long_contexts() -> None:
    """torch's softplus is the identity above 20 unless told otherwise: 4e-11 off here."""
    scores = torch.tensor([[[21.0, 0.5, -30.0, 37.5]]], dtype=torch.float64)
    mask = torch.ones(1, 4, dtype=torch.bool)
    weights = get_variant("lssa").weights(scores, Rows.of(mask, {}, torch.float64))
    s = [math.log1p(math.exp(x)) for x in scores[0, 0].tolist()]
    assert_weights(weights[0, 0], [y / sum(s) for y in s], rtol=1e-14, atol=0)


@pytest.mark.parametrize("name", ["lssa", "lssar"])
def test_softplus_first_row_has_weight_one(name: str) -> None:
    assert_weights(row(get_variant(name), [-4.0]), [1.0])


def test_lssar_offset_is_0_on_three_rows_and_1_after() -> None:
    variant = get_variant("lssar", power=2.0)
    for n in (2, 3, 4, 7):
        x = math.log(2) * math.log(n)
        s = [math.log1p(math.exp(x))] + [math.log1p(math.exp(-x))] * (n - 1)
        offset = 0.0 if n <= 3 else sum(s) / n
        a = [max(y - offset, 0.0) ** 2 for y in s]
        got = row(variant, [1.0] + [-1.0] * (n - 1))
        assert_weights(got, [y / sum(a) for y in a], rtol=1e-13, atol=1e-15)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 9])
def test_lssar_uniform_row(n: int) -> None:
    assert_weights(row(get_variant("lssar"), [2.0] * n), [1 / n] * n)


def test_lssar_paper_defaults() -> None:
    assert get_variant("lssar") == get_variant("lssar", power=15)
    assert get_variant("softpick") == get_variant("softpick", eps=1e-6)


def test_selective_first_penalty() -> None:
    """F[3, 1] = relu(L0[2, 1]) is the first that can be positive."""
    g = seeded(3)
    q = torch.rand(1, 4, 3, generator=g, dtype=torch.float64)
    k = torch.rand(1, 4, 3, generator=g, dtype=torch.float64)
    penalty = penalties(get_variant("selective"), q, k, 0.5)
    assert penalty is not None
    want = torch.zeros(4, 4, dtype=torch.float64)
    want[3, 1] = 0.5 * (q[0, 2] @ k[0, 1])
    assert want[3, 1] > 0
    torch.testing.assert_close(penalty, want, rtol=1e-14, atol=0)


@pytest.mark.parametrize("window", [None, 1, 2, 4, 9])
def test_selective_penalties_equal_the_triple_loop(window: int | None) -> None:
    q, k, _ = make_inputs(get_variant("selective"), Shape(2, 1, 0, 15, 15, 4, 4), seed=4).qkv
    penalty = penalties(get_variant("selective"), q, k, 0.5, window)
    assert penalty is not None
    want = paper_formulas.penalties(q.tolist(), k.tolist(), scale=0.5, window=window)
    seen = causal(15)
    torch.testing.assert_close(
        penalty[seen], torch.tensor(want, dtype=torch.float64)[seen], rtol=1e-12, atol=1e-13
    )
    assert (penalty[:, 0] == 0).all(), "the first token is never masked"
    assert (penalty.diagonal() == 0).all(), "a token never masks itself"
    assert window is not None or (penalty[seen] > 0).sum() > 40


def test_selective_uses_head_0_and_its_raw_scores() -> None:
    """Other heads' queries leave the penalties alone; head 0's change those of every head."""
    variant = get_variant("selective")
    q, k, v = make_inputs(variant, Shape(3, 3, 0, 9, 9, 4, 4), seed=5).qkv
    _, state = reference.attention(variant, q, k, v)
    other = q.clone()
    other[1:] += 1.0
    assert torch.equal(state_of(reference.attention(variant, other, k, v)), state_of((q, state)))
    selecting = q.clone()
    selecting[0] *= 2.0
    out, doubled = reference.attention(variant, selecting, k, v)
    torch.testing.assert_close(doubled, 2 * state_of((q, state)), rtol=1e-13, atol=0)
    assert not torch.allclose(out[2], reference.attention(variant, q, k, v)[0][2])


def state_of(result: tuple[Tensor, Tensor | None]) -> Tensor:
    state = result[1]
    assert state is not None
    return state


@pytest.mark.parametrize("variant", [v for v in VARIANTS if v.learned], ids=str)
def test_learned_tensors_far_from_the_start(variant: Variant) -> None:
    """On both sides of the values they start from, where a formula may clamp them."""
    rows, (q, k, v) = range(13), make_inputs(variant, Shape(4, 2, 0, 13, 13, 8, 8), seed=1).qkv
    learned = {
        name: variant.initial(name) + q.new_tensor([0.0, 3.0, -3.0, 1.0])
        for name in variant.learned
    }
    _, want = by_paper_formula(variant, q, k, v, rows=rows, window=None, learned=learned)
    got, _ = reference.attention(variant, q, k, v, learned=learned)
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=CONFIGURATION_IDS)
def test_reference_equals_formula(variant: Variant, shape: Shape) -> None:
    inputs = make_inputs(variant, shape, seed=1)
    q, k, v = inputs.qkv
    rows = range(shape.start, shape.stop)
    _, want = by_paper_formula(variant, q, k, v, rows=rows, window=shape.window, **inputs.given())
    state = None
    if variant.stateful and shape.start:
        _, state = reference.attention(
            variant,
            q[:, : shape.start],
            k[:, : shape.start],
            v[:, : shape.start],
            window=shape.window,
            **inputs.given(slice(shape.start)),
        )
    got, _ = reference.attention(
        variant,
        q[:, shape.start : shape.stop],
        k,
        v,
        query_start=shape.start,
        window=shape.window,
        **inputs.given(),
        state=state,
    )
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [SHAPES[3], SHAPES[6]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=CONFIGURATION_IDS)
def test_weights_equal_formula(variant: Variant, shape: Shape) -> None:
    """Weights, not only outputs, with a scale that is not 1/sqrt(d)."""
    inputs = make_inputs(variant, shape, seed=2, spread=3.0)
    positions = torch.arange(shape.length)
    _, got = attend(
        variant,
        *inputs.qkv,
        causal_mask(positions, positions, shape.window),
        scale=0.7,
        **inputs.given(),
        penalty=penalties(variant, inputs.q, inputs.k, 0.7, shape.window),
    )
    want, _ = by_paper_formula(
        variant, *inputs.qkv, scale=0.7, window=shape.window, **inputs.given()
    )
    torch.testing.assert_close(got, want, rtol=1e-11, atol=1e-13)
