"""A stateful variant's C++ kernels on pages of a budget (pruned.hpp)."""

from __future__ import annotations

import functools
from ctypes import byref

from torch import Tensor

from attn_kernels.batch import Batch
from attn_kernels.cpu.kernel import CPUKernel
from attn_kernels.cpu.structs import FORMATS, PrunedCall, head_rows
from attn_kernels.pruning import PageShape


class PrunedCPULayer:
    """The kernels bound to one layer's pages. Not for concurrent calls.

    Args:
        kernel: a stateful variant's kernels.
        pages: `[num_pages, shape.num_bytes]` uint8, each a page of `attn_kernels.pruning`.
        shape: of each page.
        num_heads: the layer's query heads.
        scale: factor of the raw scores.

    Raises:
        ValueError: the kernels do not support this head size or dtype.
    """

    def __init__(
        self,
        kernel: CPUKernel,
        pages: Tensor,
        shape: PageShape,
        *,
        num_heads: int,
        scale: float,
    ) -> None:
        if reason := kernel.unsupported(shape.head_size, 16, shape.dtype):
            raise ValueError(f"the CPU kernels do not support {reason}")
        self.pages = pages
        self.dtype = shape.dtype
        self._call = PrunedCall(
            pages=pages.data_ptr(),
            page_stride=pages.stride(0),
            values=kernel.values,
            scale=scale,
            num_heads=num_heads,
            num_kv_heads=shape.num_kv_heads,
            head_size=shape.head_size,
            budget=shape.budget,
            page_format=FORMATS[shape.dtype],
        )
        self._run = functools.partial(kernel.library.attnserve_attend_pruned, byref(self._call))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, batch: Batch, out: Tensor) -> None:
        """Store a step's tokens and attend; see `attn_kernels.pruning.TorchPrunedLayer`.

        Raises:
            MemoryError: no memory for the kernel's scratch space.
        """
        call = self._call
        query, call.query_stride = head_rows(query)
        key, call.key_stride = head_rows(key.to(self.dtype))
        value, call.value_stride = head_rows(value.to(self.dtype))
        call.query, call.query_format = query.data_ptr(), FORMATS[query.dtype]
        call.key, call.value = key.data_ptr(), value.data_ptr()
        call.out, call.out_format = out.data_ptr(), FORMATS[out.dtype]
        call.out_stride = out.stride(0)
        call.batch = batch.address
        if self._run():
            raise MemoryError("no memory for the attention kernel's scratch space")
