"""A stateful variant's C++ kernels on pages of a budget (pruned.hpp)."""

from __future__ import annotations

import functools
from ctypes import byref
from typing import Any

from torch import Tensor

from attn_kernels.batch import Batch
from attn_kernels.cpu.kernel import CPUKernel
from attn_kernels.cpu.structs import FORMATS, PrunedCall, head_rows
from attn_kernels.pruning import PageShape, PrunedLayer


class PrunedCPULayer(PrunedLayer):
    """The kernels bound to one layer's pages. Not for concurrent calls.

    Args:
        kernel: a stateful variant's kernels.
        pages, shape, options: as in `PrunedLayer`.
    """

    def __init__(self, kernel: CPUKernel, pages: Tensor, shape: PageShape, **options: Any) -> None:
        super().__init__(kernel.variant, pages, shape, **options)
        if reason := kernel.unsupported(shape.head_size, 16, shape.dtype):
            raise ValueError(f"the CPU kernels do not support {reason}")
        self._call = PrunedCall(
            pages=pages.data_ptr(),
            page_stride=pages.stride(0),
            values=kernel.values,
            scale=self.scale,
            num_heads=self.num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_size=shape.head_size,
            budget=shape.budget,
            page_format=FORMATS[shape.dtype],
        )
        self._run = functools.partial(kernel.library.attnserve_attend_pruned, byref(self._call))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, batch: Batch, out: Tensor) -> None:
        call = self._call
        query, call.query_stride = head_rows(query)
        key, call.key_stride = head_rows(key.to(self.shape.dtype))
        value, call.value_stride = head_rows(value.to(self.shape.dtype))
        call.query, call.query_format = query.data_ptr(), FORMATS[query.dtype]
        call.key, call.value = key.data_ptr(), value.data_ptr()
        call.out, call.out_format = out.data_ptr(), FORMATS[out.dtype]
        call.out_stride = out.stride(0)
        call.batch = batch.address
        if self._run():
            raise MemoryError("no memory for the attention kernel's scratch space")
