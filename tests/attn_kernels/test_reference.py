"""The reference agrees with itself however a sequence is cut, and float32 `attend` with it."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor

from attn_kernels import Variant, attend, causal_mask, reference
from tests.attn_kernels.cases import (
    CONFIGURATION_IDS,
    SHAPES,
    VARIANTS,
    Inputs,
    Shape,
    decode,
    make_inputs,
    penalties,
)

WHOLE = [shape for shape in SHAPES if shape.stop - shape.start == shape.length]
every_variant = pytest.mark.parametrize("variant", VARIANTS, ids=CONFIGURATION_IDS)


def chunked(
    variant: Variant, inputs: Inputs, sizes: list[int], window: int | None = None
) -> tuple[Tensor, Tensor | None]:
    """Return the reference on consecutive chunks of queries, each against the keys to its end."""
    starts = [0]
    while starts[-1] < inputs.q.shape[-2]:
        size = sizes[(len(starts) - 1) % len(sizes)]
        starts.append(min(starts[-1] + size, inputs.q.shape[-2]))
    outputs, state = [], None
    for start, stop in pairwise(starts):
        output, state = reference.attention(
            variant,
            inputs.q[..., start:stop, :],
            inputs.k[..., :stop, :],
            inputs.v[..., :stop, :],
            window=window,
            **inputs.given(slice(stop)),
            state=state,
        )
        outputs.append(output)
    return torch.cat(outputs, -2), state


def cast(inputs: Inputs, dtype: torch.dtype) -> Inputs:
    q, k, v = (x.to(dtype) for x in inputs.qkv)
    return Inputs(q, k, v, {n: x.to(dtype) for n, x in inputs.learned.items()}, inputs.gates)


def whole(
    variant: Variant, inputs: Inputs, window: int | None = None
) -> tuple[Tensor, Tensor | None]:
    return reference.attention(variant, *inputs.qkv, window=window, **inputs.given())


def assert_same(
    got: tuple[Tensor, Tensor | None], want: tuple[Tensor, Tensor | None], stateful: bool
) -> None:
    torch.testing.assert_close(got[0], want[0], rtol=1e-11, atol=1e-12)
    assert (got[1] is not None) == (want[1] is not None) == stateful
    if got[1] is not None:
        torch.testing.assert_close(got[1], want[1], rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("shape", WHOLE, ids=str)
@every_variant
def test_token_by_token_equals_dense(variant: Variant, shape: Shape) -> None:
    inputs = make_inputs(variant, shape, seed=10)
    decoded = decode(variant, *inputs.qkv, window=shape.window, **inputs.given())
    assert_same(decoded, whole(variant, inputs, shape.window), variant.stateful)


@pytest.mark.parametrize("sizes", [[1], [2], [3, 1], [7], [16], [5, 1, 1, 9]], ids=str)
@pytest.mark.parametrize("window", [None, 4], ids=["full", "window4"])
@every_variant
def test_chunked_equals_dense(variant: Variant, window: int | None, sizes: list[int]) -> None:
    inputs = make_inputs(variant, Shape(4, 2, 0, 23, 23, 8, 6), seed=11)
    want = whole(variant, inputs, window)
    assert_same(chunked(variant, inputs, sizes, window), want, variant.stateful)


@every_variant
def test_leading_batch_dimensions(variant: Variant) -> None:
    """Each element of a `[2, 3]` batch equals the same sequence alone, state included."""
    shape = Shape(4, 2, 0, 9, 9, 4, 5)
    parts = [make_inputs(variant, shape, seed=20 + i) for i in range(6)]
    given = parts[0].given()
    batch = [
        torch.stack(x).unflatten(0, (2, 3)) for x in zip(*(part.qkv for part in parts), strict=True)
    ]
    if variant.gated:
        gates = torch.stack([part.given()["gates"] for part in parts])
        given["gates"] = gates.unflatten(0, (2, 3))
    out, state = reference.attention(variant, *batch, window=5, **given)
    decoded, _ = decode(variant, *batch, window=5, **given)
    torch.testing.assert_close(decoded, out, rtol=1e-11, atol=1e-12)
    for i, part in enumerate(parts):
        part = Inputs(*part.qkv, parts[0].learned, part.gates)
        alone = reference.attention(variant, *part.qkv, window=5, **part.given())
        at = divmod(i, 3)
        there = out[at], None if state is None else state[at]
        assert_same(there, alone, variant.stateful)


@every_variant
def test_default_query_start_is_the_end_of_the_keys(variant: Variant) -> None:
    inputs = make_inputs(variant, Shape(2, 1, 0, 8, 8, 4, 4), seed=12)
    q = inputs.q[:, 5:]
    implied, _ = reference.attention(variant, q, inputs.k, inputs.v, **inputs.given())
    stated, _ = reference.attention(variant, q, inputs.k, inputs.v, query_start=5, **inputs.given())
    assert torch.equal(implied, stated)


def test_more_queries_than_keys_is_an_error() -> None:
    inputs = make_inputs(VARIANTS[0], Shape(1, 1, 0, 4, 4, 2, 2))
    with pytest.raises(ValueError, match="4 queries do not fit before key 3"):
        reference.attention(VARIANTS[0], inputs.q, inputs.k[:, :3], inputs.v[:, :3])


def with_junk(inputs: Inputs, keys: slice, junk: float) -> Inputs:
    """Return them with `junk` in all that these keys have."""
    k, v = inputs.k.clone(), inputs.v.clone()
    k[:, keys] = junk
    v[:, keys] = junk
    gates = inputs.gates
    if gates is not None:
        gates = gates.clone()
        gates[:, keys] = junk
    return Inputs(inputs.q, k, v, inputs.learned, gates)


@pytest.mark.parametrize("junk", [float("nan"), float("inf"), 1e300], ids=str)
@every_variant
def test_keys_after_the_last_query_do_not_leak(variant: Variant, junk: float) -> None:
    """A fully masked tail, as a paged cache has beyond the sequence's length."""
    inputs = make_inputs(variant, Shape(4, 2, 0, 16, 16, 8, 8), seed=13)
    stop = 9
    state = torch.rand(stop, dtype=torch.float64) if variant.stateful else None
    want, state_want = reference.attention(
        variant,
        inputs.q[:, 6:stop],
        inputs.k[:, :stop],
        inputs.v[:, :stop],
        **inputs.given(slice(stop)),
        state=state,
    )
    junked = with_junk(inputs, slice(stop, None), junk)
    got, state_got = reference.attention(
        variant,
        inputs.q[:, 6:stop],
        junked.k,
        junked.v,
        query_start=6,
        **junked.given(),
        state=state,
    )
    torch.testing.assert_close(got, want, rtol=1e-13, atol=1e-14)
    if state_got is not None:
        torch.testing.assert_close(state_got[:stop], state_want, rtol=1e-13, atol=0)
        assert (state_got[stop:] == 0).all()


@pytest.mark.parametrize("junk", [float("nan"), float("inf")], ids=str)
@every_variant
def test_keys_before_the_window_do_not_leak(variant: Variant, junk: float) -> None:
    """Blocks that left the window may have been freed and hold another sequence by now."""
    window, start = 3, 10
    inputs = make_inputs(variant, Shape(4, 2, 0, 14, 14, 8, 8), seed=14)
    state = torch.rand(start, dtype=torch.float64) if variant.stateful else None
    junked = with_junk(inputs, slice(start - window + 1), junk)
    results = [
        reference.attention(
            variant, x.q[:, start:], x.k, x.v, window=window, **x.given(), state=state
        )
        for x in (inputs, junked)
    ]
    assert_same(results[1], results[0], variant.stateful)
    assert results[1][0].isfinite().all()


# The largest error of float32 against the reference, for values of size about 1 at 96 keys:
# about four times the largest seen over ten seeds.
FLOAT32_TOLERANCE = {
    # A weight's relative error is its score's error: a few units, rounded at 2^-24.
    "default": 4e-6,
    # ln(n) multiplies the scores, and their error, by up to 4.6.
    "ssmax": 1.5e-5,
    # The power multiplies the relative error of a difference of near numbers by 15.
    "lssar": 4e-5,
}


@pytest.mark.parametrize("window", [None, 33], ids=["full", "window33"])
@every_variant
def test_float32_attend_is_close_to_the_reference(variant: Variant, window: int | None) -> None:
    inputs = make_inputs(variant, Shape(4, 2, 0, 96, 96, 32, 32), seed=15)
    want, _ = whole(variant, inputs, window)
    q, k, v = (x.float() for x in inputs.qkv)
    positions = torch.arange(96)
    got, weights = attend(
        variant,
        q,
        k,
        v,
        causal_mask(positions, positions, window),
        learned={name: x.float() for name, x in inputs.learned.items()},
        gates=inputs.gates,
        penalty=penalties(variant, q, k, 32**-0.5, window),
    )
    assert got.dtype == weights.dtype == torch.float32
    tolerance = FLOAT32_TOLERANCE.get(variant.name, FLOAT32_TOLERANCE["default"])
    torch.testing.assert_close(got.double(), want, rtol=0, atol=tolerance)


@every_variant
def test_reference_takes_any_dtype_and_answers_in_float64(variant: Variant) -> None:
    inputs = make_inputs(variant, Shape(2, 2, 0, 6, 6, 4, 4), seed=16)
    half = cast(inputs, torch.bfloat16)
    exact = cast(half, torch.float64)
    got = whole(variant, half)
    assert got[0].dtype == torch.float64
    assert torch.equal(got[0], whole(variant, exact)[0])


@every_variant
def test_row_that_sees_no_key_is_zero(variant: Variant) -> None:
    """As padding rows are: output and weights 0, and the other rows as if it were not there."""
    inputs = make_inputs(variant, Shape(4, 2, 0, 6, 6, 4, 4), seed=17)
    mask = torch.ones(6, 6, dtype=torch.bool).tril()
    mask[2] = False
    penalty = penalties(variant, inputs.q, inputs.k, 0.5)

    def attended(mask: Tensor) -> tuple[Tensor, Tensor]:
        return attend(variant, *inputs.qkv, mask, **inputs.given(), penalty=penalty)

    out, weights = attended(mask)
    assert (out[:, 2] == 0).all() and (weights[:, 2] == 0).all()
    full, _ = attended(mask.new_ones(6, 6).tril())
    keep = [0, 1, 3, 4, 5]
    torch.testing.assert_close(out[:, keep], full[:, keep], rtol=1e-13, atol=1e-14)
    none, _ = attended(torch.zeros(6, 6, dtype=torch.bool))
    assert (none == 0).all()
