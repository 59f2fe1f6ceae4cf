"""The Triton kernels of a budget, bound to one layer's pages."""

from __future__ import annotations

from typing import Any

import torch
import triton
from torch import Tensor

from attn_kernels.batch import Batch, heads_together
from attn_kernels.pruning import LARGEST_GPU_BUDGET, PageShape, PrunedLayer
from attn_kernels.triton.layer import constants, device_figures, functions, scratch
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
        group = self.num_heads // shape.num_kv_heads
        self.page = PagedSlots(
            shape.num_kv_heads,
            group,
            shape.head_size,
            triton.next_power_of_2(shape.head_size),
            shape.budget,
            max(16, triton.next_power_of_2(shape.budget)),
        )
        arch, _ = device_figures(pages.device)
        self.tile = tile_for(DECODE, arch, shape.head_size, shape.dtype.itemsize, group)
        given = {**functions(variant), "PAGE": self.page}
        self.scan_constants = constants(scan_kernel, given)
        self.attend_constants = constants(attend_kernel, given)

    def attend(self, query: Tensor, key: Tensor, value: Tensor, batch: Batch, out: Tensor) -> None:
        num_tokens, num_reqs = query.shape[0], batch.seq_lens.shape[0]
        if num_tokens == 0:
            return
        dtype, slots, num_kv_heads = self.shape.dtype, self.page.slots, self.page.num_kv_heads
        query = heads_together(query)
        key, value = heads_together(key.to(dtype)), heads_together(value.to(dtype))
        sources = scratch(query.device, "sources", num_tokens, slots).view(torch.int32)
        penalties = scratch(query.device, "penalties", num_tokens, slots)
        page_stride, table_stride = self.pages.stride(0), batch.block_table.stride(0)
        scan_kernel[(num_reqs,)](
            query, key, self.pages, batch.block_table, batch.query_start_loc, batch.seq_lens,
            sources, penalties, self.scale,
            query.stride(0), key.stride(0), page_stride, table_stride,
            **self.scan_constants, enable_fp_fusion=True, num_warps=8,
        )  # fmt: skip
        attend_kernel[(num_tokens, num_kv_heads)](
            out, query, key, value, self.pages, batch.block_table, batch.query_start_loc,
            sources, penalties, self.scale, num_reqs,
            query.stride(0), key.stride(0), value.stride(0), out.stride(0),
            page_stride, table_stride,
            **self.attend_constants, ROWS=self.tile.rows, KEYS=min(slots, self.tile.keys),
            **self.tile.options,
        )  # fmt: skip
        store_kernel[(num_tokens, num_kv_heads)](
            key, value, self.pages, batch.block_table, batch.query_start_loc, sources, num_reqs,
            key.stride(0), value.stride(0), page_stride, table_stride,
            PAGE=self.page, enable_fp_fusion=True, num_warps=1,
        )  # fmt: skip
