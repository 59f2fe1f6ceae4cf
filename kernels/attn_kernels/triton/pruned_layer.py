"""The Triton kernels of a budget, bound to one layer's pages."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from attn_kernels.batch import Batch
from attn_kernels.pruning import LARGEST_GPU_BUDGET, PageShape, PrunedLayer
from attn_kernels.triton.layer import device_figures, functions, scratch_of
from attn_kernels.triton.pruned import PagedSlots, attend_kernel, scan_kernel, store_kernel
from attn_kernels.triton.tuning import DECODE, tile_for
from attn_kernels.variant import Variant


class TritonPrunedLayer(PrunedLayer):
    """One layer's attention within a budget on a GPU. No call waits for the device, and what is
    launched depends on the numbers of tokens and requests only."""

    def __init__(self, variant: Variant, pages: Tensor, shape: PageShape, **options: Any) -> None:
        super().__init__(variant, pages.view(shape.dtype), shape, **options)
        if shape.budget > LARGEST_GPU_BUDGET:
            raise ValueError(
                f"the GPU kernels take budgets to {LARGEST_GPU_BUDGET}, not {shape.budget}"
            )
        self.scratch = scratch_of(pages.device)
        arch, _ = device_figures(pages.device)
        self.page = PagedSlots(
            shape.num_kv_heads,
            self.num_heads // shape.num_kv_heads,
            shape.head_size,
            triton.next_power_of_2(shape.head_size),
            shape.budget,
            max(16, triton.next_power_of_2(shape.budget)),
        )
        self.tile = tile_for(DECODE, arch, shape.head_size, shape.dtype.itemsize, self.page.group)
        self.functions = functions(variant)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, batch: Batch, out: Tensor) -> None:
        num_tokens, num_reqs = query.shape[0], batch.seq_lens.shape[0]
        if num_tokens == 0:
            return
        query, key, value = (
            x if x.stride()[1:] == (self.page.head_size, 1) else x.contiguous()
            for x in (query, key.to(self.shape.dtype), value.to(self.shape.dtype))
        )
        slots = self.page.slots
        sources = self.scratch.take("sources", num_tokens, slots).view(torch.int32)
        penalties = self.scratch.take("penalties", num_tokens, slots)
        page_stride, table_stride = self.pages.stride(0), batch.block_table.stride(0)
        scan_kernel[(num_reqs,)](
            query,
            key,
            self.pages,
            batch.block_table,
            batch.query_start_loc,
            batch.seq_lens,
            sources,
            penalties,
            self.scale,
            query.stride(0),
            key.stride(0),
            page_stride,
            table_stride,
            SELECTION=self.functions.selection,
            PAGE=self.page,
            enable_fp_fusion=True,
            num_warps=8,
        )
        attend_kernel[(num_tokens, self.page.num_kv_heads)](
            out,
            query,
            key,
            value,
            self.pages,
            batch.block_table,
            batch.query_start_loc,
            sources,
            penalties,
            self.scale,
            num_reqs,
            query.stride(0),
            key.stride(0),
            value.stride(0),
            out.stride(0),
            page_stride,
            table_stride,
            **self.functions.attend,
            PAGE=self.page,
            ROWS=self.tile.rows,
            KEYS=min(slots, self.tile.keys),
            enable_fp_fusion=True,
            num_warps=self.tile.num_warps,
            num_stages=self.tile.num_stages,
        )
        store_kernel[(num_tokens, self.page.num_kv_heads)](
            key,
            value,
            self.pages,
            batch.block_table,
            batch.query_start_loc,
            sources,
            num_reqs,
            key.stride(0),
            value.stride(0),
            page_stride,
            table_stride,
            PAGE=self.page,
            enable_fp_fusion=True,
            num_warps=1,
        )
