"""Attention on a GPU against the float64 reference: every variant, dtype, head size, group, window
and float8 caches, on caches with NaN in every unused slot."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.attn_kernels.cases import GPU_KERNELS
from tests.gpu.paged import (
    DTYPES,
    KEY_SCALE,
    ON_GPU,
    Paged,
    PagedRequests,
    Setup,
    check,
    stored,
    worse,
)

HEAD_DIMS = (128, 64, 256, 80)
GROUPS = (4, 1, 3)
WINDOWS = (None, 24)
FP8_CAPABILITY = (8, 9)

UNSPLIT = 1
"""Multiprocessors as `TritonLayer` is told: with one, no context is cut into parts."""


def split_processors(device: str) -> int:
    """Return so many that a few decoding requests are cut into 32 parts (in the interpreter, 2)."""
    return 132 if device == "cuda" else 8


def tiny(variant: str, window: int | None = None, **settings: Any) -> Setup:
    """Return a setup that the interpreter gets through in seconds."""
    return Setup(
        variant, "fp32", 32, 2, window, device="cpu", longest=12, num_kv_heads=1, **settings
    )


def full() -> list[Setup]:
    """Return all setups for a GPU: first each variant in each dtype in its most usual shape, then
    float8 caches and caches of codes, then the rest in random order, so that a run that is cut
    short has seen something of all."""
    variants = GPU_KERNELS
    first = [Setup(variant, dtype, 128, 4) for dtype, variant in product(DTYPES, variants)]
    float8 = [Setup(v, "bf16", size, 4, fp8=True) for size, v in product(HEAD_DIMS, variants)]
    codes = [Setup(v, "bf16", 64, 4, bits=bits) for bits, v in product((8, 4), variants)]
    rest = [Setup(*each) for each in product(variants, DTYPES, HEAD_DIMS, GROUPS, WINDOWS)]
    rest = [setup for setup in rest if setup not in first]
    random.Random(0).shuffle(rest)
    return first + float8 + codes + rest


def phases(
    lengths: tuple[int, ...], split: int
) -> Iterator[tuple[str, int, list[tuple[int, int, int]]]]:
    """Yield the steps that run requests to their ends: `(phase, multiprocessors, spans)`."""
    halves = [n // 2 for n in lengths]
    yield "prefill", split, [(r, 0, half) for r, half in enumerate(halves)]
    # The first request decodes while the others are prefilled.
    done = [
        halves[0] + 1,
        *(max(half, n - 4) for n, half in zip(lengths[1:], halves[1:], strict=True)),
    ]
    spans = zip(halves, done, strict=True)
    yield "mixed", split, [(r, a, b) for r, (a, b) in enumerate(spans) if b > a]
    for step in range(max(n - d for n, d in zip(lengths, done, strict=True))):
        phase, processors = (("decode unsplit", UNSPLIT), ("decode split", split))[step % 2]
        now = [(r, d + step) for r, d in enumerate(done) if d + step < lengths[r]]
        yield phase, processors, [(r, d, d + 1) for r, d in now]


@pytest.mark.parametrize(
    "setup",
    [tiny(name, 6 if name == "selective" else None) for name in GPU_KERNELS]
    + [tiny("softpick", bits=4)]
    + [pytest.param(setup, marks=ON_GPU) for setup in full()],
    ids=str,
)
def test_equals_the_reference(setup: Setup, record_property: Callable[[str, object], None]) -> None:
    """Prefill, prefill beside decode, decode with whole contexts and with contexts in parts."""
    nvidia = setup.fp8 and not torch.version.hip
    if nvidia and torch.cuda.get_device_capability() < FP8_CAPABILITY:
        pytest.skip("float8 needs a GPU of compute capability 8.9 or later")
    requests = PagedRequests(setup)
    paged = Paged(requests)
    errors: dict[str, float] = {}
    for phase, processors, spans in phases(setup.lengths, split_processors(setup.device)):
        paged.layer.num_multiprocessors = processors
        error = paged.error(spans, paged.step(spans))
        errors[phase] = worse(error, errors.get(phase, 0.0))
    for phase, error in errors.items():
        record_property(phase, f"{error:.1e}")
    check(errors, requests)
    assert min(errors.values()) > 0, "the kernel cannot be exact: it was not run"


# The harness itself


def test_phases_reach_every_token() -> None:
    lengths = (8, 37, 150)
    done = [0, 0, 0]
    processors: dict[str, int] = {}
    for phase, count, spans in phases(lengths, 132):
        processors[phase] = count
        for request, start, end in spans:
            assert done[request] == start < end
            done[request] = end
        if phase == "mixed":
            assert {1} < {end - start for _, start, end in spans}
    assert done == list(lengths)
    assert processors["decode split"] == 132 and processors["decode unsplit"] == 1


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda out: out.mul_(1.0001), "errors above 1e-05"),
        # In the first request: the others' errors must not hide it.
        (lambda out: out[0].fill_(torch.nan), "'prefill': nan"),
        (lambda out: out[-1].zero_(), "wrote behind the last query"),
    ],
    ids=["slightly wrong", "NaN", "behind the end"],
)
def test_wrong_outputs_fail(
    spoil: Callable[[Tensor], Tensor], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from attn_kernels.triton import TritonLayer

    attend = TritonLayer.attend

    def spoiled(self: Any, query: Tensor, batch: Any, out: Tensor) -> None:
        attend(self, query, batch, out)
        spoil(out)

    monkeypatch.setattr(TritonLayer, "attend", spoiled)
    setup = tiny("softmax")
    requests = PagedRequests(setup)
    phase, _, spans = next(phases(setup.lengths, 16))
    with pytest.raises(AssertionError, match=message):
        paged = Paged(requests)
        check({phase: paged.error(spans, paged.step(spans))}, requests)


def test_every_combination_is_tested() -> None:
    found, names = full(), GPU_KERNELS
    plain = {
        (s.variant, s.dtype, s.head_dim, s.group, s.window) for s in found if not (s.fp8 or s.bits)
    }
    assert len(plain) == len(names) * 3 * 4 * 3 * 2
    assert sum(s.fp8 for s in found) == len(names) * 4
    assert len(found) - len(plain) == len(names) * (4 + 2)  # of 8 and 4 bits
    assert len({str(s) for s in found}) == len(found)


@pytest.mark.parametrize("dtype", [*DTYPES.values(), torch.float8_e4m3fn], ids=str)
def test_all_bits_set_are_nan(dtype: torch.dtype) -> None:
    bits = torch.full((dtype.itemsize,), 255, dtype=torch.uint8)
    assert bool(bits.view(dtype).float().isnan().all())


def test_float8_keys_are_not_clamped() -> None:
    keys = torch.cat(PagedRequests(tiny("softmax", fp8=True)).k)
    assert float(keys.abs().max()) < 448 * KEY_SCALE
    # Three bits after the first; below 2^-6 of the scale steps of 2^-9 of it.
    rounding = (keys.abs() / 16).clamp(min=KEY_SCALE * 2**-10)
    assert bool(((stored(keys, KEY_SCALE) - keys).abs() <= rounding * 1.001).all())
