"""What a newcomer calls: `attend` computes every variant from q, k, v and a mask, or says what is
missing; it never computes another attention function in silence."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from attn_kernels import Variant, attend, causal_mask, get_variant, reference
from tests.attn_kernels.cases import (
    CONFIGURATION_IDS,
    SHAPES,
    VARIANTS,
    Shape,
    causal,
    make_inputs,
    penalties,
    seeded,
)

WHOLE = [shape for shape in SHAPES if (shape.start, shape.stop) == (0, shape.length)]


@pytest.mark.parametrize("shape", WHOLE, ids=str)
@pytest.mark.parametrize("variant", VARIANTS, ids=CONFIGURATION_IDS)
def test_attend_is_the_reference(variant: Variant, shape: Shape) -> None:
    """Of a whole sequence, without a penalty: also a stateful variant's."""
    inputs = make_inputs(variant, shape, seed=3, spread=2.0)
    positions = torch.arange(shape.length)
    mask = causal_mask(positions, positions, shape.window)
    got, _ = attend(variant, *inputs.qkv, mask, **inputs.given())
    want, _ = reference.attention(variant, *inputs.qkv, window=shape.window, **inputs.given())
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_selective_is_not_softmax() -> None:
    q, k, v = (torch.randn(2, 4, 9, 8, generator=seeded(i)) for i in range(3))
    got, _ = attend(get_variant("selective"), q, k, v, causal(9))
    softmax, _ = attend(get_variant("softmax"), q, k, v, causal(9))
    assert (got - softmax).abs().max() > 0.1


def test_selective_batch_with_padding() -> None:
    """Left padding selects nothing and the first real token is never selected."""
    variant = get_variant("selective")
    q, k, v = (torch.randn(2, 4, 9, 8, generator=seeded(i)).double() for i in range(3))
    mask = causal(9).repeat(2, 1, 1, 1)
    mask[1, :, :3] = False
    mask[1, :, :, :3] = False
    got, _ = attend(variant, q, k, v, mask)
    for i, start in enumerate((0, 3)):
        want, _ = reference.attention(variant, *(x[i, :, start:] for x in (q, k, v)))
        torch.testing.assert_close(got[i, :, start:], want, rtol=1e-12, atol=1e-12)
    assert (got[1, :, :3] == 0).all()


def rows(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=seeded(0))


GOOD: dict[str, Any] = {
    "q": rows(4, 6, 8),
    "k": rows(2, 6, 8),
    "v": rows(2, 6, 8),
    "mask": causal(6),
}


@pytest.mark.parametrize(
    ("variant", "changed", "error", "line"),
    [
        ("ssmax", {}, ValueError, r"ssmax attention learns ssmax_scale: pass learned="),
        (
            "ssmax",
            {"learned": {"ssmax_scale": torch.ones(2)}},
            ValueError,
            r"ssmax_scale must be \[num_heads\] = \[4\], not \[2\]",
        ),
        ("softmax", {"mask": causal(6).float()}, TypeError, "mask must be bool.*torch.float32"),
        (
            "softmax",
            {"mask": causal(5)},
            ValueError,
            r"= \[4, 6, 6\], not mask \[5, 5\]",
        ),
        ("softmax", {"mask": causal(6)[None].repeat(3, 1, 1)}, ValueError, "mask must broadcast"),
        ("softmax", {"k": rows(2, 6, 4)}, ValueError, "the same head size"),
        ("softmax", {"k": rows(3, 6, 8), "v": rows(3, 6, 8)}, ValueError, "must be a multiple"),
        ("softmax", {"v": rows(2, 5, 8)}, ValueError, "the same heads and keys"),
        ("softmax", {"q": rows(6, 8)}, ValueError, r"must be \[\.\.\., heads, tokens, size\]"),
        ("softmax", {"q": rows(3, 4, 6, 8), "k": rows(5, 2, 6, 8)}, ValueError, "leading"),
        ("softmax", {"q": rows(4, 6, 8).double()}, TypeError, "one dtype"),
        ("softmax", {"q": rows(4, 6, 8).bfloat16()}, TypeError, "float32 or float64"),
        ("selective", {"q": rows(4, 1, 8), "mask": causal(6)[-1:]}, ValueError, "earlier queries"),
        ("selective", {"mask": torch.ones(6, 6, dtype=torch.bool)}, ValueError, "is causal"),
    ],
)
def test_one_clear_line(
    variant: str, changed: dict[str, Any], error: type[Exception], line: str
) -> None:
    given = GOOD | changed
    with pytest.raises(error, match=line):
        attend(get_variant(variant), **given)


def test_budgets_are_not_ignored() -> None:
    variant = get_variant("selective", kv_budgets=(4,))
    with pytest.raises(ValueError, match="leave out selective's kv_budgets"):
        attend(variant, **GOOD)


@pytest.mark.parametrize("variant", VARIANTS, ids=CONFIGURATION_IDS)
def test_compiled(variant: Variant) -> None:
    """The checks break no graph."""
    torch.compiler.reset()
    shape = Shape(4, 2, 0, 6, 6, 4, 4)
    inputs = make_inputs(variant, shape, seed=4)
    penalty = penalties(variant, inputs.q, inputs.k, 0.5)

    @torch.compile(fullgraph=True, backend="eager", dynamic=True)
    def compiled(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return attend(variant, q, k, v, causal(6), **inputs.given(), penalty=penalty)[0]

    want, _ = attend(variant, *inputs.qkv, causal(6), **inputs.given())
    torch.testing.assert_close(compiled(*inputs.qkv), want)


def test_ssmax_with_fixed_parameters_needs_nothing() -> None:
    variant = get_variant("ssmax", scale=0.4)
    got, _ = attend(variant, **GOOD)
    want, _ = reference.attention(variant, *(GOOD[name] for name in "qkv"))
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
