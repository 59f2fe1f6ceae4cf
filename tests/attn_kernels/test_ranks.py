"""A stateful variant on several tensor-parallel ranks, each told head 0's queries and keys: outputs
are the reference's of all heads, and accumulators and evictions the same bits on every rank."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch

from attn_kernels import Variant, cpu, get_variant, pruning
from attn_kernels.paged import TorchLayer
from tests.attn_kernels import test_paged as paged
from tests.attn_kernels import test_pruned_layers as pruned
from tests.attn_kernels.ranks import PrunedRanks, Ranks, empty_heads

SHAPES = (
    (paged.SHAPES[0], 2),
    (paged.SHAPES[2], 2),  # one KV head, which both ranks have
    (paged.SHAPES[3], 3),
    (paged.SHAPES[4], 2),
    (paged.SHAPES[5], 2),
)


def make_layer(
    ranks: int, cache: paged.Cache, path: str, variant: Variant, num_heads: int, **options: Any
) -> Any:
    """In place of `Cache.layer`."""
    bind: Any = functools.partial(TorchLayer, variant)
    if path != "torch":
        kernel = cpu.load(variant, path)
        assert kernel is not None
        bind = kernel.layer
    return Ranks(ranks, functools.partial(bind, **options), variant, cache.kv, num_heads)


@pytest.mark.parametrize(("dtype", "window"), paged.FORMATS, ids=str)
@pytest.mark.parametrize(("shape", "ranks"), SHAPES, ids=str)
def test_equals_reference(
    shape: paged.Shape,
    ranks: int,
    dtype: torch.dtype,
    window: int | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(paged.Cache, "layer", functools.partialmethod(layer_of, ranks))
    for path in paged.PATHS:
        error = paged.error_against_reference(path, "selective", shape, window, dtype, 1)
        assert error <= paged.tolerance(path, dtype), path


def layer_of(cache: paged.Cache, ranks: int, *args: Any, **options: Any) -> Any:
    return make_layer(ranks, cache, *args, **options)


def test_split_contexts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Long contexts are cut into parts for the threads, and prefills into tiles."""
    monkeypatch.setattr(paged.Cache, "layer", functools.partialmethod(layer_of, 2))
    shape = paged.Shape(4, 2, 32, 32, 1100, 1097)
    for window, dtype in ((None, torch.float32), (700, torch.float32), (None, torch.bfloat16)):
        for path in paged.ISAS:
            error = paged.error_against_reference(path, "selective", shape, window, dtype, 5)
            assert error <= paged.tolerance(path, dtype), (path, dtype, window)


def budget_ranks(kind: str, shape: pruned.Shape, dtype: torch.dtype, ranks: int) -> PrunedRanks:
    """Return what `pruned.make_layer` does, on ranks."""

    def bind(page: pruning.PageShape, heads: int) -> Any:
        pages = torch.full((pruned.NUM_PAGES, page.num_bytes + 64), 0xFF, dtype=torch.uint8)
        pages = pages[:, : page.num_bytes]
        options: dict[str, Any] = {"num_heads": heads, "scale": shape.scale}
        if kind == "torch":
            return pruning.TorchPrunedLayer(shape.variant, pages, page, **options)
        kernel = cpu.load(shape.variant, kind)
        assert kernel is not None
        return cpu.PrunedCPULayer(kernel, pages, page, **options)

    return PrunedRanks(ranks, bind, shape.page(dtype), shape.heads)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", pruned.KINDS)
@pytest.mark.parametrize(("place", "ranks"), [(0, 2), (1, 3), (2, 2), (3, 2), (4, 3)])
def test_budgets(place: int, ranks: int, kind: str, dtype: torch.dtype) -> None:
    shape = pruned.SHAPES[place]
    for chunk in (1, 13, 64):
        layer = budget_ranks(kind, shape, dtype, ranks)
        outputs = pruned.in_chunks(layer, shape, dtype, chunk)
        for output, right in zip(outputs, pruned.expected(shape, dtype), strict=True):
            rounding = 2 * torch.finfo(dtype).eps * float(right.abs().max())
            limit = 3e-4 if dtype == torch.float32 else rounding
            torch.testing.assert_close(output.double(), right, rtol=0, atol=limit)


def test_refuses_what_is_missing() -> None:
    variant = get_variant("selective")
    kernel = cpu.load(variant)
    assert kernel is not None
    layer = kernel.layer(
        empty_heads(variant, 3, 1, 16, 32, torch.float32), num_heads=2, scale=1.0, selector=True
    )
    with pytest.raises(ValueError, match="head 0 is another rank's"):
        layer.write_cache(torch.zeros(1, 1, 32), torch.zeros(1, 1, 32), torch.tensor([0]))
    with pytest.raises(ValueError, match="only a stateful variant's cache"):
        TorchLayer(
            get_variant("softmax"),
            torch.zeros(1, 1, 16, 64),
            num_heads=1,
            scale=1.0,
            selector=True,
        )
