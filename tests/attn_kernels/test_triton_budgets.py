"""The GPU kernels of attention within a budget, interpreted, against the reference in torch
operations: pieces of steps, large budgets, equal accumulators, padding.

Interpreting each step's arithmetic, these tests say nothing about registers or speed."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from attn_kernels import get_variant
from attn_kernels.batch import Batch
from attn_kernels.pruning import Page, PageShape
from tests.attn_kernels import test_pruned_layers as pruned
from tests.attn_kernels.cases import seeded


def triton_pages(shape: pruned.Shape, dtype: torch.dtype, chunk: int) -> Any:
    """Return a layer within a budget that processes so many tokens at once."""
    from attn_kernels.triton import TritonPrunedLayer

    options: dict[str, Any] = {"num_heads": shape.heads, "scale": shape.scale}
    pages, page = pruned.pages_of(shape, dtype), shape.page(dtype)
    layer = TritonPrunedLayer(shape.variant, pages, page, **options)
    layer.chunk = chunk
    return layer


BUDGET_SIZES = (
    (4, 2, 32, 5, (36, 1, 17)),
    (2, 1, 48, 70, (16, 90)),  # slots in several tiles
)


@pytest.mark.parametrize("name", pruned.PRUNABLE)
@pytest.mark.parametrize("sizes", BUDGET_SIZES, ids=str)
def test_budgets_in_pieces(name: str, sizes: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps of more tokens than are processed at once, and decoding: outputs, and what is kept, in
    the same slots, whatever the pieces are, and the parts of a page in a decode, some empty."""
    from attn_kernels.triton import pruned as kernels

    shape = pruned.Shape(name, *sizes)
    kept: list[torch.Tensor] = []
    pages = torch.randperm(pruned.NUM_PAGES, generator=seeded(3))[: len(shape.lengths)]
    for step, piece, decoding in ((90, 16, None), (19, 32, 57), (60, 32, 60)):
        monkeypatch.setattr(kernels, "SLOTS_OF_PART", 16 if step == 60 else 256)
        layer = triton_pages(shape, torch.float32, piece)
        outputs = pruned.in_chunks(layer, shape, torch.float32, step, decoding)
        for output, right in zip(outputs, pruned.expected(shape, torch.float32), strict=True):
            torch.testing.assert_close(output.double(), right, rtol=0, atol=3e-4)
        kept.append(layer.pages.view(torch.uint8)[pages])
    layer = pruned.make_layer("torch", shape, torch.float32)
    pruned.in_chunks(layer, shape, torch.float32, 100)
    for place, n in enumerate(shape.lengths):
        taken, page = min(n, shape.budget), shape.page(torch.float32)
        reference = Page.view(layer.pages[pages[place]], page)
        for memory in kept:
            found = Page.view(memory[place], page)
            assert torch.equal(found.positions[:taken], reference.positions[:taken])
            assert torch.equal(found.keys[:, :taken], reference.keys[:, :taken])
            assert torch.equal(found.values[:, :taken], reference.values[:, :taken])
            difference = found.accumulators.long() - reference.accumulators.long()
            assert int(difference[:taken].abs().max()) <= n  # a rounding of each addition


@pytest.mark.parametrize("budget", [5000, 16384])
def test_large_budgets(budget: int) -> None:
    """A full page, a prefill of two pieces and decoding: all as the reference does."""
    shape = pruned.Shape("selective", 2, 1, 16, budget, ())
    g, page, before = seeded(budget), shape.page(torch.float32), budget + 3000
    layer = triton_pages(shape, torch.float32, 16)
    right = pruned.make_layer("torch", shape, torch.float32)
    full = Page.view(right.pages[2], page)
    full.keys.normal_(generator=g)
    full.values.normal_(generator=g)
    # Far enough apart that no rounding decides.
    full.accumulators.copy_(torch.randperm(budget, generator=g) * 1000)
    full.positions.copy_(torch.randperm(before - 1, generator=g)[:budget] + 1)
    full.positions[7], full.accumulators[7] = 0, 0
    layer.pages.view(torch.uint8)[2].copy_(right.pages[2])
    for n in (21, 1):
        q, k, v = (torch.randn(n, heads, 16, generator=g) for heads in (2, 1, 1))
        batch = Batch(
            torch.tensor([[2]]), torch.tensor([0, n]), torch.tensor([before + n]), max_query_len=n
        )
        outputs = [torch.full_like(q, torch.nan) for _ in range(2)]
        for each, out in zip((layer, right), outputs, strict=True):
            each.step(q, k, v, batch, out)
        torch.testing.assert_close(*outputs, rtol=0, atol=1e-4)
        found = Page.view(layer.pages.view(torch.uint8)[2], page)
        assert torch.equal(found.positions, full.positions)
        assert torch.equal(found.keys, full.keys) and torch.equal(found.values, full.values)
        assert int((found.accumulators.long() - full.accumulators.long()).abs().max()) <= 22
        before += n
    assert int((full.positions >= before - 22).sum()) == 22  # each has evicted another


@pytest.mark.parametrize("factor", [0.0, 1e9], ids=["nothing is added", "accumulators are full"])
def test_equal_accumulators(factor: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """The oldest of equal ones is evicted, but never the first token; nothing is written beside the
    scratch memory."""
    from attn_kernels.triton import layer as layers

    margins: list[torch.Tensor] = []

    def amid(device: torch.device, name: str, *shape: int) -> torch.Tensor:
        whole = torch.full((math.prod(shape) + 128,), 7.0)
        margins.extend((whole[:64], whole[-64:]))
        return whole[64:-64].view(shape)

    monkeypatch.setattr(layers, "scratch", amid)
    shape = pruned.Shape("selective", 2, 1, 16, 6, (45,))
    k = torch.randn(45, 1, 16, generator=seeded(1)).abs()
    pages = []
    for layer in (
        triton_pages(shape, torch.float32, 16),
        pruned.make_layer("torch", shape, torch.float32),
    ):
        for start, stop in ((0, 40), (40, 41), (41, 45)):
            batch = Batch(torch.zeros(1, 1), torch.tensor([0, stop - start]), torch.tensor([stop]))
            part = k[start:stop]
            layer.step(factor * part.expand(-1, 2, -1), part, part, batch, torch.empty(45, 2, 16))
        pages.append(Page.view(layer.pages.view(torch.uint8)[0], shape.page(torch.float32)))
    assert margins and all((margin == 7.0).all() for margin in margins)
    found, right = pages
    assert torch.equal(found.positions, right.positions) and 0 in found.positions
    assert torch.equal(found.accumulators, right.accumulators)


@pytest.mark.parametrize("size", [1, 20])
def test_padding_within_a_budget(size: int) -> None:
    """Requests and tokens that a captured graph has room for are not touched."""
    shape = pruned.Shape("selective", 2, 1, 16, 6, (1, 1))
    q, k, v = (torch.randn(2 * size + 3, heads, 16, generator=seeded(2)) for heads in (2, 1, 1))
    results = []
    for padding in (0, 3):
        layer = triton_pages(shape, torch.float32, 16)
        starts = torch.tensor([0, size, *[2 * size] * (padding + 1)])
        batch = Batch(
            torch.tensor([[1], [0], *[[10**9]] * padding]), starts,
            torch.tensor([size, size, *[0] * padding]), max_query_len=size,
        )  # fmt: skip
        out = torch.full_like(q, torch.nan)
        tokens = 2 * size + padding
        layer.step(q[:tokens], k[:tokens], v[:tokens], batch, out)
        assert out[2 * size :].isnan().all()
        results += [out[: 2 * size], layer.pages.view(torch.uint8)]
    assert not results[0].isnan().any()
    assert torch.equal(results[0], results[2]) and torch.equal(results[1], results[3])


def test_scratch_within_a_budget() -> None:
    """Chunks are as long as fits in SCRATCH_BYTES, and no longer than a step."""
    from attn_kernels.triton.pruned import SCRATCH_BYTES, chunk_length

    assert chunk_length(1, 64, 64, 4096, 256) == 16
    assert chunk_length(100, 100, 1, 4096, 256) == 128
    assert chunk_length(8192, 8192, 1, 16384, 256) == 256
    length = chunk_length(512, 8192, 16, 16384, 256)
    assert 16 < length < 256 and 4 * 16 * length * (16384 + length) <= SCRATCH_BYTES


def test_decodes_apart_within_a_budget() -> None:
    """A batch whose first requests have one query each is the same in two halves."""
    shape = pruned.Shape("selective", 2, 1, 16, 6, (9, 12, 20))
    q, k, v = (torch.randn(41, heads, 16, generator=seeded(4)) for heads in (2, 1, 1))
    table, results = torch.tensor([[4], [0], [2]]), []
    for decodes in (0, 2):
        layer = triton_pages(shape, torch.float32, 16)
        prompts = Batch(table[:2], torch.tensor([0, 8, 19]), torch.tensor([8, 11]))
        layer.step(q[:19], k[:19], v[:19], prompts, torch.empty_like(q))
        batch = Batch(
            table, torch.tensor([0, 1, 2, 22]), torch.tensor([9, 12, 20]), max_query_len=20,
            num_decodes=decodes,
        )  # fmt: skip
        assert len(batch.halves) == decodes
        out = torch.full((22, 2, 16), torch.nan)
        layer.step(q[19:], k[19:], v[19:], batch, out)
        results.append((out, layer.pages.view(torch.uint8).clone()))
    (out, pages), (apart, pages_apart) = results
    torch.testing.assert_close(out, apart, rtol=0, atol=1e-5)
    assert torch.equal(pages, pages_apart)


@pytest.mark.parametrize(("arch", "stages"), [("sm_80", 3), ("sm_89", 2), ("gfx942", 1)])
def test_stages_that_there_is_room_for(arch: str, stages: int) -> None:
    """An L4 has 99 KiB of shared memory a program, where three stages take 120."""
    from attn_kernels.triton import TritonPrunedLayer

    shape = PageShape(64, 2, 128, torch.bfloat16)
    pages = torch.zeros(1, shape.num_bytes, dtype=torch.uint8)
    options: dict[str, Any] = {"num_heads": 8, "scale": 1.0, "arch": arch}
    layer = TritonPrunedLayer(get_variant("selective"), pages, shape, **options)
    assert (layer.prefill_tile.rows, layer.prefill_tile.num_stages) == (64, stages)
