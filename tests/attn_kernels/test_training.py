"""The kernels of training against autograd of the float64 reference, in Triton's interpreter: odd
shapes, groups, windows, padding and packed texts, with NaN around everything that may be read."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from attn_kernels import Variant, attend, get_variant, reference, variant_names
from attn_kernels import variant as registry
from tests.attn_kernels.cases import CONFIGURATION_IDS, VARIANTS
from tests.attn_kernels.probe import Probe
from tests.attn_kernels.test_triton import interpreter

__all__ = ["interpreter"]

LIMIT = 1e-4
"""Of errors, by the largest entry (seen: 5e-5, of ssmax's biases, whose terms cancel)."""
NARROW_LIMIT = {torch.bfloat16: 2e-2, torch.float16: 3e-3}


class Shape(NamedTuple):
    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_size: int
    window: int | None = None


SHAPES = (
    Shape(1, 2, 1, 83, 32),
    Shape(1, 3, 3, 45, 24, 17),  # a head size that is no power of two
    Shape(1, 2, 1, 33, 16, 40),  # one token behind a tile, a window that nothing leaves
    Shape(1, 1, 1, 1, 8),
)


def inside_nan(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a copy in the middle of NaN, its heads behind its tokens."""
    batch, heads, tokens, size = x.shape
    around = torch.full((batch, tokens + 2, heads, size + 8), torch.nan, dtype=dtype)
    inner = around[:, 1:-1, :, :size].transpose(1, 2)
    inner.copy_(x)
    return inner.detach().requires_grad_()


def mask_of(rows: Tensor) -> Tensor:
    """Return bool `[batch, 1, num_tokens, num_tokens]`."""
    keys = torch.arange(rows.shape[-1])
    return ((keys >= rows[0, ..., None]) & (keys < rows[1, ..., None]))[:, None]


def errors(
    variant: Variant, shape: Shape, dtype: torch.dtype = torch.float32, rows: Tensor | None = None
) -> list[float]:
    """Return the errors of the output and of the gradients of q, k, v, the learned tensors and the
    gates."""
    from attn_kernels.triton import training

    torch.manual_seed(0)
    batch, heads, kv_heads, tokens, size, window = shape
    inputs = [torch.randn(batch, h, tokens, size).to(dtype) for h in (heads, kv_heads, kv_heads)]
    spread = torch.linspace(0.5, 1.5, heads)
    others = [spread + variant.initial(name) for name in variant.learned]
    if variant.gated:
        others.append(torch.rand(batch, heads, tokens).log() / 4)
    direction = torch.randn(batch, heads, tokens, size).to(dtype)
    exact = [x.double().requires_grad_() for x in (*inputs, *others)]
    causal = training.causal_rows(batch, tokens, window)
    mask = mask_of(causal if rows is None else rows)

    def named(tensors: list[Tensor]) -> dict[str, Any]:
        learned = dict(zip(variant.learned, tensors, strict=False))
        return {"learned": learned, "gates": tensors[-1] if variant.gated else None}

    q, k, v = exact[:3]
    wanted, _ = attend(variant, q, k, v, mask, **named(exact[3:]))
    gradients = torch.autograd.grad(wanted, exact, direction.double())

    ours = [*(inside_nan(x, dtype) for x in inputs), *(x.requires_grad_() for x in others)]
    q, k, v = ours[:3]
    found = training.attention(variant, q, k, v, **named(ours[3:]), window=window, rows=rows)
    assert found.dtype == dtype
    backward = torch.autograd.grad(found, ours, inside_nan(direction, dtype).detach())
    both = zip((found, *backward), (wanted, *gradients), strict=True)
    return [
        float((a - b).detach().abs().max() / b.detach().abs().max().clamp_min(0.1)) for a, b in both
    ]


@pytest.mark.parametrize("case", range(len(VARIANTS)), ids=CONFIGURATION_IDS)
def test_equals_the_reference(case: int) -> None:
    assert max(errors(VARIANTS[case], SHAPES[case % 2])) <= LIMIT


@pytest.mark.parametrize("shape", SHAPES[1:], ids=str)
@pytest.mark.parametrize("name", ["softpick", "lssar", "selective", "forgetting"])
def test_odd_shapes(name: str, shape: Shape) -> None:
    assert max(errors(get_variant(name), shape)) <= LIMIT


@pytest.mark.parametrize(("name", "dtype"), [("softpick", torch.bfloat16), ("lssa", torch.float16),
                                             ("selective", torch.bfloat16),
                                             ("forgetting", torch.bfloat16)])  # fmt: skip
def test_16_bits(name: str, dtype: torch.dtype) -> None:
    """Weights and the derivatives of scores are rounded before the next product."""
    assert max(errors(get_variant(name), SHAPES[0], dtype)) <= NARROW_LIMIT[dtype]


ROWS: dict[str, Callable[[Tensor], tuple[Tensor, Tensor]]] = {
    "padding on the left": lambda i: (i * 0 + 20, (i + 1) * (i >= 20) + 20 * (i < 20)),
    "padding on the right": lambda i: (i * 0, (i + 1).clamp(max=30) * (i < 30)),
    "three texts": lambda i: (torch.where(i < 9, 0, torch.where(i < 41, 9, 41)), i + 1),
    "texts of one token": lambda i: (i, i + 1),
    "both ways": lambda i: (i // 16 * 16, (i // 16 * 16 + 16).clamp(max=len(i))),
}


@pytest.mark.parametrize("kind", ROWS)
@pytest.mark.parametrize("name", ["softpick", "selective", "forgetting"])
def test_any_interval_of_keys(name: str, kind: str) -> None:
    """Of the second of two sequences; a stateful variant is causal."""
    if name == "selective" and kind == "both ways":
        return
    tokens = torch.arange(50)
    plain = torch.stack((tokens * 0, tokens + 1))
    both = torch.stack((plain, torch.stack(ROWS[kind](tokens))), 1)
    rows = torch.cat((both, both[1:] - 1)).to(torch.int32)
    assert max(errors(get_variant(name), Shape(2, 1, 1, 50, 16), rows=rows)) <= LIMIT


@pytest.mark.parametrize("name", variant_names())
def test_extremes_are_finite(name: str) -> None:
    """Vectors of length 0, equal scores and very large ones; the same at each run."""
    from attn_kernels.triton import training

    torch.manual_seed(0)
    variant = get_variant(name)
    learned = {key: torch.full((1,), 1.0) for key in variant.learned}
    q, k, v = (torch.randn(1, 1, 40, 16) for _ in range(3))
    q[:, :, 3:9], k[:, :, :5] = 0.0, 0.0
    q[:, :, 20:] *= 1e3
    tensors = [x.requires_grad_() for x in (q, k, v)]
    gates = None
    if variant.gated:  # one that forgets nearly all, and many that forget nothing
        gates = torch.zeros(1, 1, 40)
        gates[..., 30] = -1e4
        tensors.append(gates.requires_grad_())
    runs = []
    for _ in range(2 if name == "softpick" else 1):
        out = training.attention(variant, *tensors[:3], learned=learned, gates=gates)
        runs.append([out, *torch.autograd.grad(out.sum(), tensors)])
    assert all(x.isfinite().all() for x in runs[0])
    assert all(map(torch.equal, runs[0], runs[-1]))


def test_a_variant_with_a_bias_and_everything_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """Positions, lengths, distances and learned tensors reach its functions; it does not say how
    learned tensors are trained, and so is refused by name."""
    from attn_kernels.triton import training
    from attn_kernels.triton import variant as triton_variant

    monkeypatch.setattr(registry, "_REGISTRY", dict(registry._REGISTRY))
    registry.register(Probe)
    q, k, v = (torch.randn(1, heads, 50, 16) for heads in (4, 2, 2))
    learned = {name: torch.rand(4) for name in Probe().learned}
    assert triton_variant.missing_derivative(Probe()) == "weights_backward"
    with pytest.raises(ValueError, match=r"has no weights_backward; use attn_kernels\.attend"):
        training.attention(Probe(), q.requires_grad_(), k, v, learned=learned)
    q.requires_grad_(False)
    found = training.attention(Probe(), q, k, v, learned=learned, window=7)
    wanted, _ = reference.attention(Probe(), q, k, v, learned=learned, window=7)
    torch.testing.assert_close(found.double(), wanted, atol=LIMIT, rtol=0)


def test_refused() -> None:
    from attn_kernels.triton.training import attention

    q, k = torch.randn(1, 4, 5, 8), torch.randn(1, 2, 5, 8)
    call = functools.partial(attention, get_variant("ssmax"))
    with pytest.raises(TypeError, match="one dtype, float32, bfloat16 or float16"):
        call(q.double(), k.double(), k.double())
    with pytest.raises(TypeError, match="one dtype"):
        call(q, k.half(), k.half())
    with pytest.raises(ValueError, match="a divisor of its heads"):
        call(q[:, :3], k, k)
    with pytest.raises(ValueError, match=r"learns ssmax_scale: pass it as \[4\]"):
        call(q, k, k)
    learned = {"ssmax_scale": torch.ones(4)}
    with pytest.raises(ValueError, match=r"forgetting needs gates, \[1, 4, 5\]"):
        attention(get_variant("forgetting"), q, k, k, gates=torch.zeros(1, 2, 5))
    with pytest.raises(ValueError, match="ssmax has no gates: leave them out"):
        call(q, k, k, learned={"ssmax_scale": torch.ones(4)}, gates=torch.zeros(1, 4, 5))
    with pytest.raises(ValueError, match="leave out the window"):
        call(q, k, k, learned=learned, rows=torch.zeros(3, 1, 5, dtype=torch.int32), window=3)
    with pytest.raises(ValueError, match="a head size of 512 is too large for the kernels"):
        call(*(torch.zeros(1, 1, 2, 512),) * 3, learned={"ssmax_scale": torch.ones(1)})
    with pytest.raises(ValueError, match="rows must be int32"):
        call(q, k, k, learned=learned, rows=torch.zeros(3, 1, 5))
    assert call(q[:, :, :0], k[:, :, :0], k[:, :, :0], learned=learned).shape == (1, 4, 0, 8)


def test_a_third_learned_tensor_is_refused() -> None:
    """Kernels know two: the gradient of another would be what was in memory."""
    from attn_kernels.triton.variant import missing_derivative

    class Three(type(get_variant("ssmax"))):  # type: ignore[misc]
        learned = ("one", "two", "three")

    Three.folder = type(get_variant("ssmax")).folder
    assert missing_derivative(Three()) == "place for three, a third learned tensor"


@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("size", [2, 4])
def test_tiles_of_a_stateful_variant(wide: bool, size: int) -> None:
    """Accumulators are stored ahead of each tile of queries: all kernels have the same."""
    from attn_kernels.triton import tuning

    kinds = (tuning.FORWARD, tuning.BACKWARD_QUERIES, tuning.BACKWARD_KEYS, tuning.SELECTIONS)
    for dims in (16, 32, 64, 128, 256):
        tiles = (
            tuning.training_tile(kind, "sm_90", dims, size, stateful=True, wide=wide)
            for kind in kinds
        )
        assert len({tile.rows for tile in tiles}) == 1


def test_small_heads_fill_the_least_matrix() -> None:
    """A GPU multiplies 16 columns at least, which the interpreter does not know."""
    from attn_kernels.triton.training import Call

    q, k = torch.zeros(1, 2, 3, 8), torch.zeros(1, 1, 3, 8)
    assert Call(get_variant("softmax"), q, k, k, q, [], None, 1.0).given["SHAPE"] == (2, 2, 8, 16)
