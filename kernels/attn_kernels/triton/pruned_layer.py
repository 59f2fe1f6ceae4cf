"""The Triton kernels of a budget, bound to one layer's pages."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from attn_kernels.batch import Batch
from attn_kernels.pruning import LARGEST_GPU_BUDGET, PageShape
from attn_kernels.triton.layer import device_figures, functions, scratch_of
from attn_kernels.triton.pruned import attend_kernel, scan_kernel, store_kernel
from attn_kernels.triton.tuning import DECODE, tile_for
from attn_kernels.variant import Variant


class TritonPrunedLayer:
    """One layer's attention within a budget on a GPU. No call waits for the device, and what is
    launched depends on the numbers of tokens and requests only.

    Args:
        variant: a stateful variant.
        pages: `[num_pages, shape.num_bytes]` uint8, each a page of `attn_kernels.pruning`.
        shape: of each page.
        num_heads: the layer's query heads.
        scale: factor of the raw scores.

    Raises:
        ValueError: the budget is too large for one program.
    """

    def __init__(
        self,
        variant: Variant,
        pages: Tensor,
        shape: PageShape,
        *,
        num_heads: int,
        scale: float,
    ) -> None:
        if shape.budget > LARGEST_GPU_BUDGET:
            raise ValueError(
                f"the GPU kernels take budgets to {LARGEST_GPU_BUDGET}, not {shape.budget}"
            )
        self.pages = pages.view(shape.dtype)
        self.dtype, self.scale = shape.dtype, scale
        self.num_kv_heads = shape.num_kv_heads
        self.group = num_heads // shape.num_kv_heads
        self.head_size = shape.head_size
        self.scratch = scratch_of(pages.device)
        arch, _ = device_figures(pages.device)
        self.tile = tile_for(DECODE, arch, shape.head_size, shape.dtype.itemsize, self.group)
        self.shape = {
            "NUM_KV_HEADS": shape.num_kv_heads,
            "HEAD_SIZE": shape.head_size,
            "BUDGET": shape.budget,
            "SLOTS": max(16, triton.next_power_of_2(shape.budget)),
            "DIMS": triton.next_power_of_2(shape.head_size),
        }
        names = ("QUERY_FACTOR", "START", "WEIGH_TILE", "FINISH", "PARAMS")
        self.functions = {name: functions(variant)[name] for name in names}

    def attend(self, query: Tensor, key: Tensor, value: Tensor, batch: Batch, out: Tensor) -> None:
        """Store a step's tokens and attend; see `attn_kernels.pruning.TorchPrunedLayer`."""
        num_tokens, num_reqs = query.shape[0], batch.seq_lens.shape[0]
        if num_tokens == 0:
            return
        query, key, value = (
            x if x.stride()[1:] == (self.head_size, 1) else x.contiguous()
            for x in (query, key.to(self.dtype), value.to(self.dtype))
        )
        slots = self.shape["SLOTS"]
        sources = self.scratch.take("sources", num_tokens, slots).view(torch.int32)
        penalties = self.scratch.take("penalties", num_tokens, slots)
        page_stride, table_stride = self.pages.stride(0), batch.block_table.stride(0)
        common = {**self.shape, "enable_fp_fusion": True}
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
            num_warps=8,
            **common,
        )
        attend_kernel[(num_tokens, self.num_kv_heads)](
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
            GROUP=self.group,
            ROWS=self.tile.rows,
            KEYS=min(slots, self.tile.keys),
            num_warps=self.tile.num_warps,
            num_stages=self.tile.num_stages,
            **self.functions,
            **common,
        )
        store_kernel[(num_tokens, self.num_kv_heads)](
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
            num_warps=1,
            **common,
        )
