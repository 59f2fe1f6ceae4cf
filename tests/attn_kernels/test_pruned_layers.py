"""Attention over pages of a budget, of the C++ kernels and in torch operations, against
`attend_pruned` in float64: many requests, in chunks, in pages that others have used."""

from __future__ import annotations

import dataclasses
import functools
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from attn_kernels import Variant, cpu, get_variant, pruning, variant_names
from attn_kernels.batch import Batch
from tests.attn_kernels.cases import seeded

PRUNABLE = [name for name in variant_names() if get_variant(name).prunable]
NUM_PAGES = 9


@dataclasses.dataclass(frozen=True)
class Shape:
    """A layer, and how many tokens its requests have."""

    name: str
    heads: int
    kv_heads: int
    head_size: int
    budget: int
    lengths: tuple[int, ...]

    def page(self, dtype: torch.dtype) -> pruning.PageShape:
        return pruning.PageShape(self.budget, self.kv_heads, self.head_size, dtype)

    @property
    def variant(self) -> Variant:
        return get_variant(self.name)

    @property
    def scale(self) -> float:
        return self.head_size**-0.5

    def __str__(self) -> str:
        return f"{self.name}_h{self.heads}kv{self.kv_heads}_d{self.head_size}_b{self.budget}"


SIZES = (
    (4, 2, 32, 24, (70, 1, 24, 25, 90)),
    (3, 3, 48, 2, (1, 2, 3, 40)),
    (6, 1, 64, 17, (50, 18)),
    (2, 1, 256, 33, (64,)),
    (9, 3, 80, 200, (60, 130)),  # ample: nothing is evicted
)
SHAPES = [Shape(name, *sizes) for name in PRUNABLE for sizes in SIZES]
FIRST = SHAPES[:: len(SIZES)]
"""The first of each variant."""


def is_clear(q: Tensor, k: Tensor, shape: Shape) -> bool:
    """No eviction is so close that float32's rounding of the scores could decide it otherwise."""
    n = q.shape[1]
    added = pruning.fixed_point(shape.variant.selection(q[0] * shape.scale @ k[0].T)).tril(-1)
    added[:, 0] = 0
    before = added.cumsum(0) - added
    deaths, _ = pruning.evict(before, torch.arange(n), 0, shape.budget)
    for victim, i in enumerate(deaths.tolist()):
        if i < n:
            rivals = (torch.arange(n) < i) & (deaths > i)
            rivals[0] = False
            if rivals.any() and int((before[i, victim] - before[i, rivals]).min()) < n:
                return False
    return True


@functools.cache
def requests(shape: Shape, dtype: torch.dtype) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Each request's queries, keys and values, float64 but representable in `dtype`."""
    found, seed = [], 0
    for n in shape.lengths:
        while True:
            g = seeded(seed := seed + 1)
            q, k, v = (
                torch.randn(heads, n, shape.head_size, generator=g).to(dtype).double()
                for heads in (shape.heads, shape.kv_heads, shape.kv_heads)
            )
            if is_clear(q, k, shape):
                break
        found.append((q, k, v))
    return found


def pages_of(shape: Shape, dtype: torch.dtype) -> Tensor:
    """Pages as other requests left them, a few bytes further apart than they are long."""
    size = shape.page(dtype).num_bytes
    memory = torch.full((NUM_PAGES, size + 64), 0xFF, dtype=torch.uint8)[:, :size]
    return memory


def in_chunks(
    layer: Any, shape: Shape, dtype: torch.dtype, chunk: int, decoding: int | None = None
) -> list[Tensor]:
    """Every request's outputs `[heads, length, head_size]`, all requests in step, `chunk` tokens of
    each at a time, from token `decoding` on one; those that are done stay as requests without a
    query."""
    found = requests(shape, dtype)
    pages = torch.randperm(NUM_PAGES, generator=seeded(3))[: len(found)].int()
    outputs: list[list[Tensor]] = [[] for _ in found]
    longest = max(shape.lengths)
    decoding = longest if decoding is None else decoding
    cuts = [*range(0, decoding, chunk), *range(decoding, longest), longest]
    for start, stop in itertools.pairwise(cuts):
        sizes = [max(0, min(n, stop) - start) for n in shape.lengths]
        q, k, v = (
            torch.cat([request[i][:, start:stop] for request in found], 1).transpose(0, 1).to(dtype)
            for i in range(3)
        )
        starts = torch.tensor([0, *sizes]).cumsum(0).int()
        lens = torch.tensor([min(n, stop) for n in shape.lengths]).int()
        # A table wider than the one page, as the model runner's buffers are.
        table = torch.stack([pages, pages.flip(0)], 1)
        out = torch.full((len(q) + 1, *q.shape[1:]), float("nan"), dtype=dtype)
        batch = Batch(table, starts, lens, max_query_len=max(sizes))
        layer.step(q.contiguous(), k, v.contiguous(), batch, out)
        assert out[-1].isnan().all()
        for kept, part in zip(outputs, out[:-1].split(sizes), strict=True):
            kept.append(part.transpose(0, 1))
    return [torch.cat(parts, 1) for parts in outputs]


def expected(shape: Shape, dtype: torch.dtype) -> list[Tensor]:
    outputs = []
    for q, k, v in requests(shape, dtype):
        wide = shape.page(torch.float64)
        page = pruning.Page.view(torch.zeros(wide.num_bytes, dtype=torch.uint8), wide)
        outputs.append(pruning.attend_pruned(shape.variant, q, k, v, page, 0, shape.scale))
    return outputs


def make_layer(kind: str, shape: Shape, dtype: torch.dtype) -> Any:
    pages, page = pages_of(shape, dtype), shape.page(dtype)
    options: dict[str, Any] = {"num_heads": shape.heads, "scale": shape.scale}
    if kind == "torch":
        return pruning.TorchPrunedLayer(shape.variant, pages, page, **options)
    kernel = cpu.load(shape.variant, kind)
    assert kernel is not None
    return cpu.PrunedCPULayer(kernel, pages, page, **options)


# Portable code is compiled from the same source and runs everywhere; the best is what serves.
KINDS = ("torch", "portable", cpu.usable_isas()[0])


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_float32(kind: str, shape: Shape) -> None:
    rights = expected(shape, torch.float32)
    for chunk in (1, 7, 64):
        outputs = in_chunks(make_layer(kind, shape, torch.float32), shape, torch.float32, chunk)
        for output, right in zip(outputs, rights, strict=True):
            # Penalties are whole units of 2^-16, a few of which rounding may move.
            torch.testing.assert_close(output.double(), right, rtol=0, atol=3e-4)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("shape", FIRST, ids=str)
def test_half_precision(shape: Shape, kind: str, dtype: torch.dtype) -> None:
    layer = make_layer(kind, shape, dtype)
    for output, right in zip(
        in_chunks(layer, shape, dtype, 13), expected(shape, dtype), strict=True
    ):
        tolerance = 2 * torch.finfo(dtype).eps * float(right.abs().max())
        torch.testing.assert_close(output.double(), right, rtol=0, atol=tolerance)


@pytest.mark.parametrize("kind", KINDS[1:])
@pytest.mark.parametrize("shape", FIRST, ids=str)
def test_no_chunking_changes_a_bit(shape: Shape, kind: str) -> None:
    """Not even where evictions are close, nor with other requests in the batch or more threads."""
    whole = in_chunks(make_layer(kind, shape, torch.float32), shape, torch.float32, 90)
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        for chunk in (1, 3, 16):
            again = in_chunks(make_layer(kind, shape, torch.float32), shape, torch.float32, chunk)
            for one, other in zip(whole, again, strict=True):
                assert torch.equal(one, other)
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize("shape", FIRST, ids=str)
def test_accumulators_are_the_references(shape: Shape) -> None:
    """Within the rounding of each addition; positions exactly."""
    found = {}
    for kind in KINDS:
        layer = make_layer(kind, shape, torch.float32)
        in_chunks(layer, shape, torch.float32, 16)
        pages = torch.randperm(NUM_PAGES, generator=seeded(3))[: len(shape.lengths)]
        found[kind] = [
            pruning.Page.view(layer.pages[page], shape.page(torch.float32)) for page in pages
        ]
    for kind in KINDS[1:]:
        for one, other, n in zip(found["torch"], found[kind], shape.lengths, strict=True):
            taken = min(n, shape.budget)
            assert torch.equal(one.positions[:taken], other.positions[:taken])
            difference = one.accumulators[:taken].long() - other.accumulators[:taken].long()
            assert int(difference.abs().max()) <= n


def test_refuses_a_head_size() -> None:
    with pytest.raises(ValueError, match="do not support head size 24"):
        make_layer(KINDS[1], Shape("selective", 1, 1, 24, 4, (1,)), torch.float32)
