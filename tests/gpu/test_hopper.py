"""The Gluon kernel of prefill against the float64 reference: on a GPU of Hopper, and once in the
emulator of `tests/attn_kernels/gluon_emulator.py`."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product

import pytest
import torch

from tests.attn_kernels.test_hopper import PLAIN, ask, emulate
from tests.gpu.paged import ON_GPU, Paged, PagedRequests, Setup, check
from tests.gpu.test_attention import UNSPLIT, phases, split_processors

TILES = ((128, 128, 2), (128, 64, 3), (64, 128, 2), (64, 64, 4))
"""Rows, keys and stages, in turn."""

TINY = Setup("softpick", "fp16", 64, 2, device="cpu", longest=150, num_kv_heads=1)


def full() -> list[Setup]:
    """Return the setups for a GPU, each variant first in its most usual shape."""
    found = []
    for number, (dtype, size) in enumerate(product(("bf16", "fp16"), (128, 64))):
        group, block_size = (4, 3)[number % 2], (64, 16, 128)[number % 3]
        found += [
            Setup(variant, dtype, size, group, longest=700, block_size=block_size)
            for variant in PLAIN
        ]
    return found


@pytest.mark.parametrize(
    ("setup", "tile"),
    [(TINY, TILES[-1])]
    + [
        pytest.param(setup, TILES[number % len(TILES)], marks=ON_GPU)
        for number, setup in enumerate(full())
    ],
    ids=str,
)
def test_equals_the_reference(
    setup: Setup,
    tile: tuple[int, int, int],
    monkeypatch: pytest.MonkeyPatch,
    record_property: Callable[[str, object], None],
) -> None:
    """Prefill, and prefill beside decode, with whole contexts and with contexts in parts."""
    from attn_kernels.triton import tuning

    if setup.device == "cpu":
        emulate(monkeypatch, tile)
    elif torch.version.hip or torch.cuda.get_device_capability() != (9, 0):
        pytest.skip("the kernel is for GPUs of compute capability 9.0")
    else:
        ask(monkeypatch, tile)
    monkeypatch.setattr(tuning, "KEYS_OF_PART", 32)
    requests = PagedRequests(setup)
    errors: dict[str, float] = {}
    for processors in (UNSPLIT, split_processors(setup.device)):
        paged = Paged(requests)
        paged.layer.num_multiprocessors = processors
        for phase, _, spans in list(phases(setup.lengths, processors))[:2]:
            name = f"{phase}, {processors} processors"
            errors[name] = paged.error(spans, paged.step(spans))
            record_property(name, f"{errors[name]:.1e}")
        assert paged.layer.gluon is not None
    check(errors, requests)
