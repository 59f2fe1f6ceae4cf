"""What holds for every input, tried by hypothesis on random shapes, windows and magnitudes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from attn_kernels import Rows, Variant, attend, causal_mask, get_variant, reference, selectable_mask
from tests.attn_kernels import paper_formulas
from tests.attn_kernels.cases import (
    CONFIGURATION_IDS,
    VARIANTS,
    Inputs,
    Shape,
    make_inputs,
    make_learned,
    penalties,
    seeded,
)

every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=CONFIGURATION_IDS)
# The same examples in every run. To explore, raise max_examples and drop derandomize.
few = settings(
    deadline=None,
    max_examples=20,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)

sizes = st.integers(1, 4)
shapes = st.builds(
    lambda kv_heads, group, length, head_size, value_size, window: Shape(
        kv_heads * group, kv_heads, 0, length, length, head_size, value_size, window
    ),
    kv_heads=st.integers(1, 3),
    group=sizes,
    length=st.integers(1, 20),
    head_size=st.integers(1, 9),
    value_size=sizes,
    window=st.none() | st.integers(1, 24),
)
seeds = st.integers(0, 2**32)
spreads = st.sampled_from([0.0, 0.01, 1.0, 30.0])


def run(variant: Variant, inputs: Inputs, window: int | None, scale: float | None = None) -> Tensor:
    given = inputs.given()
    return reference.attention(variant, *inputs.qkv, window=window, scale=scale, **given)[0]


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


@every_variant
@few
@given(shape=shapes, seed=seeds, spread=spreads)
def test_rows_of_weights(variant: Variant, shape: Shape, seed: int, spread: float) -> None:
    """Weights are >= 0, 0 where masked, and add up to what the formula promises."""
    inputs = make_inputs(variant, shape, seed, spread)
    positions = torch.arange(shape.length)
    mask = causal_mask(positions, positions, shape.window)
    scale = shape.head_size**-0.5
    penalty = penalties(variant, inputs.q, inputs.k, scale, shape.window)
    out, weights = attend(variant, *inputs.qkv, mask, **inputs.given(), penalty=penalty)
    assert (weights >= 0).all()
    assert (weights[:, ~mask] == 0).all()
    total = weights.sum(-1)
    row_sum = paper_formulas.entry(variant.name).row_sum
    if row_sum == "one":
        close(total, torch.ones_like(total), 1e-12)
    elif row_sum == "at most one":
        assert (total <= 1 + 1e-12).all()
    close(out, run(variant, inputs, shape.window), 1e-13)


@every_variant
@few
@given(shape=shapes, seed=seeds, data=st.data())
def test_causality(variant: Variant, shape: Shape, seed: int, data: st.DataObject) -> None:
    """Nothing at position >= j (query, key, value) changes an output before j."""
    inputs = make_inputs(variant, shape, seed)
    j = data.draw(st.integers(0, shape.length - 1), label="j")
    later = make_inputs(variant, shape, seed + 1, spread=9.0)
    q, k, v = (
        torch.cat((a[:, :j], b[:, j:]), 1) for a, b in zip(inputs.qkv, later.qkv, strict=True)
    )
    gates = None
    if inputs.gates is not None and later.gates is not None:
        gates = torch.cat((inputs.gates[:, :j], later.gates[:, j:]), 1)
    changed = Inputs(q, k, v, inputs.learned, gates)
    before = run(variant, inputs, shape.window)
    after = run(variant, changed, shape.window)
    close(after[:, :j], before[:, :j], 1e-12)
    if paper_formulas.entry(variant.name).row_sum == "one":  # other rows may be 0 before and after
        assert not torch.equal(after[:, j:], before[:, j:]), "the change must be seen from j on"


@every_variant
@few
@given(shape=shapes, seed=seeds, spread=spreads)
def test_grouped_queries_equal_repeated_keys(
    variant: Variant, shape: Shape, seed: int, spread: float
) -> None:
    inputs = make_inputs(variant, shape, seed, spread)
    group = shape.heads // shape.kv_heads
    repeated = Inputs(
        inputs.q,
        inputs.k.repeat_interleave(group, 0),
        inputs.v.repeat_interleave(group, 0),
        inputs.learned,
        inputs.gates,
    )
    close(run(variant, inputs, shape.window), run(variant, repeated, shape.window), 1e-11)


@every_variant
@few
@given(
    rows=st.integers(1, 5),
    keys=st.integers(1, 24),
    seed=seeds,
    spread=st.sampled_from([0.0, 0.1, 3.0, 50.0]),
)
def test_permuted_scores_permute_weights(
    variant: Variant, rows: int, keys: int, seed: int, spread: float
) -> None:
    """Given its raw scores, no formula looks at where a key is; masked keys do not count."""
    g = seeded(seed)
    scores = torch.randn(2, rows, keys, generator=g, dtype=torch.float64) * spread
    mask = torch.rand(rows, keys, generator=g) < 0.7
    mask[0, 0] = True
    order = torch.randperm(keys, generator=g)
    learned = make_learned(variant, 2, g)

    def weights_of(scores: Tensor, mask: Tensor) -> Tensor:
        return variant.weights(scores, Rows.of(mask, learned, scores.dtype))

    weights = weights_of(scores, mask)
    close(weights_of(scores[..., order], mask[:, order]), weights[..., order], 1e-9)
    visible = mask[0].nonzero()[:, 0]
    close(weights_of(scores[:, :1, visible], mask[:1, visible]), weights[:, :1, visible], 1e-9)


@every_variant
@few
@given(
    window=st.integers(1, 6),
    past=st.integers(1, 12),
    queries=st.integers(1, 5),
    group=sizes,
    seed=seeds,
)
def test_keys_outside_the_window_change_nothing(
    variant: Variant, window: int, past: int, queries: int, group: int, seed: int
) -> None:
    """Neither other far-past keys nor none at all: only the window's keys count."""
    start = past + window - 1
    length = start + queries
    inputs = make_inputs(variant, Shape(2 * group, 2, 0, length, length, 4, 3), seed)
    other = make_inputs(variant, Shape(2 * group, 2, 0, length, length, 4, 3), seed + 1, 50.0)
    state = torch.rand(start, generator=seeded(seed), dtype=torch.float64)
    options: dict[str, Any] = {"window": window, **inputs.given()}
    q = inputs.q[:, start:]
    want, _ = reference.attention(
        variant, q, inputs.k, inputs.v, state=state if variant.stateful else None, **options
    )
    k = torch.cat((other.k[:, :past], inputs.k[:, past:]), 1)
    v = torch.cat((other.v[:, :past], inputs.v[:, past:]), 1)
    got, _ = reference.attention(
        variant, q, k, v, state=state if variant.stateful else None, **options
    )
    close(got, want, 1e-12)
    if not variant.stateful:
        # A stateful variant may treat position 0 apart, and without its past another key is there.
        options |= inputs.given(slice(past, None))
        dropped, _ = reference.attention(variant, q, k[:, past:], v[:, past:], **options)
        close(dropped, want, 1e-12)


@every_variant
@few
@given(shape=shapes, seed=seeds, scale=st.floats(0.01, 20.0))
def test_scale(variant: Variant, shape: Shape, seed: int, scale: float) -> None:
    """Respected where the variant uses it, ignored where it says that it does not."""
    inputs = make_inputs(variant, shape, seed)
    scaled = run(variant, inputs, shape.window, scale=scale)
    default = run(variant, inputs, shape.window)
    if not variant.uses_scale:
        assert torch.equal(scaled, default)
        return
    larger = Inputs(inputs.q * scale, inputs.k, inputs.v, inputs.learned, inputs.gates)
    close(scaled, run(variant, larger, shape.window, scale=1.0))
    explicit = run(variant, inputs, shape.window, scale=shape.head_size**-0.5)
    assert torch.equal(explicit, default)


@pytest.mark.parametrize("name", ["lssa", "lssar"])
@few
@given(shape=shapes, seed=seeds, factor=st.floats(1e-6, 1e6))
def test_softplus_attention_ignores_the_length_of_vectors(
    name: str, shape: Shape, seed: int, factor: float
) -> None:
    variant = get_variant(name)
    inputs = make_inputs(variant, shape, seed)
    longer = Inputs(inputs.q * factor, inputs.k * (3 / factor), inputs.v, inputs.learned)
    close(run(variant, longer, shape.window), run(variant, inputs, shape.window))


@few
@given(shape=shapes, seed=seeds, spread=spreads, chunk=st.integers(1, 9))
def test_selective_penalty(shape: Shape, seed: int, spread: float, chunk: int) -> None:
    """Over queries a key's penalty never falls, and chunks of queries give the same penalties."""
    variant = get_variant("selective")
    q, k, _ = make_inputs(variant, shape, seed, spread).qkv
    positions = torch.arange(shape.length)
    selectable = selectable_mask(positions, positions, shape.window)
    zero = q.new_zeros(shape.length)
    penalty, state = variant.select(q, k, selectable, 0.5, zero)
    tolerance = 1e-13 * (1 + float(state.max()))
    assert (penalty >= -tolerance).all()
    assert (penalty.diff(dim=0) >= -tolerance).all()
    assert (penalty[:, 0] == 0).all() and (state[0] == 0)
    parts, carried = [], zero
    for queries in positions.split(chunk):
        part, carried = variant.select(q[:, queries], k, selectable[queries], 0.5, carried)
        parts.append(part)
    torch.testing.assert_close(torch.cat(parts), penalty, rtol=0, atol=tolerance)
    torch.testing.assert_close(carried, state, rtol=0, atol=tolerance)
