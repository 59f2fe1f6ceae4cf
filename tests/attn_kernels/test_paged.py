"""Paged attention against the float64 law: odd shapes, random paging, NaN in every unused slot."""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor

from attn_kernels import Variant, get_variant, reference, variant_names
from attn_kernels.paged import STATE_BYTES, paged_attention, write_cache

TOLERANCE = 1e-5
"""Relative to the largest output, in every cache dtype: the law sees the same rounded inputs, and
scores and sums are float32. Seen: 8e-7, and 3e-6 where lssar takes the 15th power of a score."""


@dataclass
class Cache:
    """One layer's paged cache with NaN in it, and requests whose blocks are scattered over it."""

    kv: Tensor
    block_table: Tensor

    @classmethod
    def make(
        cls,
        variant: Variant,
        seq_lens: list[int],
        num_kv_heads: int,
        head_size: int,
        block_size: int,
        dtype: torch.dtype,
    ) -> Cache:
        blocks_each = [-(-n // block_size) for n in seq_lens]
        num_blocks = sum(blocks_each) + 3
        content = 2 * head_size + variant.stateful * STATE_BYTES // dtype.itemsize
        kv = torch.full((num_blocks, num_kv_heads, block_size, content), float("nan"), dtype=dtype)
        order = torch.randperm(num_blocks).split([*blocks_each, 3])
        # Entries behind a request's last block name a block of NaN.
        table = torch.full((len(seq_lens), max(blocks_each) + 1), int(order[-1][0]))
        for row, ids in zip(table, order, strict=False):
            row[: len(ids)] = ids
        return cls(kv, table.int())

    def slots(self, request: int, start: int, end: int) -> Tensor:
        positions = torch.arange(start, end)
        block_size = self.kv.shape[2]
        blocks = self.block_table[request][positions // block_size]
        return blocks * block_size + positions % block_size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("window", [None, 1, 19], ids="window_{}".format)
@pytest.mark.parametrize(
    ("num_heads", "num_kv_heads", "head_size", "block_size", "longest", "chunk"),
    # The last one crosses a query tile.
    [(4, 2, 32, 16, 83, 7), (3, 3, 48, 32, 131, 64), (6, 1, 16, 16, 270, 263)],
    ids=["H4-Hkv2-D32-block16-chunk7", "H3-Hkv3-D48-block32-chunk64", "H6-Hkv1-D16-chunk263"],
)
@pytest.mark.parametrize("name", variant_names())
def test_equals_law(
    name: str,
    num_heads: int,
    num_kv_heads: int,
    head_size: int,
    block_size: int,
    longest: int,
    chunk: int,
    window: int | None,
    dtype: torch.dtype,
) -> None:
    """Requests of odd lengths, prefilled in chunks and decoded in one mixed batch."""
    torch.manual_seed(0)
    variant = get_variant(name)
    seq_lens = [1, 5, 33, longest]
    scale = head_size**-0.5
    learned = {tensor: torch.rand(num_heads) + 0.5 for tensor in variant.learned}
    cache = Cache.make(variant, seq_lens, num_kv_heads, head_size, block_size, dtype)
    q = [torch.randn(n, num_heads, head_size).to(dtype) * 2 for n in seq_lens]
    k = [torch.randn(n, num_kv_heads, head_size).to(dtype) for n in seq_lens]
    v = [torch.randn(n, num_kv_heads, head_size).to(dtype) for n in seq_lens]
    outputs = [torch.zeros(n, num_heads, head_size) for n in seq_lens]

    done = [0] * len(seq_lens)
    step = 0
    while done != seq_lens:
        # The longest request decodes its last tokens one by one while others are prefilled.
        ends = [
            min(n, start + (1 if n - start <= 3 else chunk))
            for n, start in zip(seq_lens, done, strict=True)
        ]
        active = [r for r, end in enumerate(ends) if end > done[r]]
        spans = [slice(done[r], ends[r]) for r in active]
        starts = [0]
        for span in spans:
            starts.append(starts[-1] + span.stop - span.start)
        step_q, step_k, step_v = (
            torch.cat([x[r][s] for r, s in zip(active, spans, strict=True)]) for x in (q, k, v)
        )
        slots = [cache.slots(r, s.start, s.stop) for r, s in zip(active, spans, strict=True)]
        # Two tokens of padding, which must not be written anywhere.
        padding = torch.full((2,), -1)
        garbage = torch.full((2, num_kv_heads, head_size), float("nan"), dtype=dtype)
        write_cache(
            variant,
            torch.cat([step_k, garbage]),
            torch.cat([step_v, garbage]),
            cache.kv,
            torch.cat([*slots, padding]),
        )
        out = torch.full((starts[-1] + 2, num_heads, head_size), float("nan"))
        paged_attention(
            variant,
            step_q,
            cache.kv,
            cache.block_table[active],
            starts,
            [ends[r] for r in active],
            scale=scale,
            window=window,
            learned=learned,
            out=out,
        )
        for r, s, start in zip(active, spans, starts, strict=False):
            outputs[r][s] = out[start : start + s.stop - s.start]
        done, step = ends, step + 1

    assert step > 1, "nothing was decoded against the cache"
    for request in range(len(seq_lens)):
        law, _ = reference.attention(
            variant,
            *(x[request].transpose(0, 1) for x in (q, k, v)),
            window=window,
            scale=scale,
            learned=learned,
        )
        error = (outputs[request].transpose(0, 1) - law).abs().max() / law.abs().max()
        assert error <= TOLERANCE, f"request {request}: relative error {error:.2e}"


@pytest.mark.parametrize("name", variant_names())
def test_window_never_reads_recycled_blocks(name: str) -> None:
    """Blocks before the window may belong to another request: the answer must not change."""
    torch.manual_seed(1)
    variant = get_variant(name)
    learned = {tensor: torch.ones(2) for tensor in variant.learned}
    n, window = 64, 16
    cache = Cache.make(variant, [n], 1, 16, 16, torch.float32)
    k, v = torch.randn(n, 1, 16), torch.randn(n, 1, 16)
    write_cache(variant, k, v, cache.kv, cache.slots(0, 0, n))
    before = cache.kv.clone()
    outs = []
    for recycle in (False, True):
        cache.kv.copy_(before)
        if recycle:
            cache.kv[cache.block_table[0, :2].long()] = float("nan")
        out = torch.empty(1, 2, 16)
        torch.manual_seed(2)
        paged_attention(
            variant,
            torch.randn(1, 2, 16),
            cache.kv,
            cache.block_table,
            [0, 1],
            [n],
            scale=0.25,
            window=window,
            learned=learned,
            out=out,
        )
        outs.append(out)
    assert torch.equal(*outs)
