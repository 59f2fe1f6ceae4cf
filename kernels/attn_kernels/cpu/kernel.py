"""A variant's C++ kernels, called through ctypes with one struct a call."""

from __future__ import annotations

import ctypes
import functools
from ctypes import byref, c_float, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_kernels.batch import Batch
from attn_kernels.cpu.build import open_library
from attn_kernels.cpu.structs import (
    FORMATS,
    AttendCall,
    CacheShape,
    PrunedCall,
    WriteCall,
    head_rows,
)
from attn_kernels.paged import Layer
from attn_kernels.variant import Variant

HEAD_SIZES = range(32, 257, 16)


class CPUKernel:
    """Paged attention of one variant.

    The cache is that of `attn_kernels.paged`, but the interior of each block of each KV head is in
    packed order (cache.hpp): fill it with `CPULayer.write_cache` only.

    Threads: as many as torch uses. Scores and sums are float32.
    """

    def __init__(self, variant: Variant, library: Path, isa: str) -> None:
        self.variant = variant
        self.isa = isa
        sizes = ctypes.sizeof(AttendCall), ctypes.sizeof(WriteCall), ctypes.sizeof(PrunedCall)
        expected = sizes[0] * 1000000 + sizes[1] * 1000 + sizes[2]
        self.library = open_library(library, "attnserve_abi", expected)
        numbers = variant.numbers()
        self.values = (c_float * max(1, len(numbers)))(*numbers)

    def unsupported(self, head_size: int, block_size: int, dtype: torch.dtype) -> str | None:
        """Return what keeps these kernels from serving a cache of this shape; None if nothing
        does."""
        if head_size not in HEAD_SIZES:
            return f"head size {head_size} (they take 32 to 256 in steps of 16)"
        if block_size % 16:
            return f"block size {block_size} (they take multiples of 16)"
        return None if dtype in FORMATS else f"a KV cache of {dtype}"

    def layer(self, kv_cache: Tensor, **options: Any) -> CPULayer:
        """Bind the kernels to one layer's cache, with the options of `CPULayer`."""
        return CPULayer(self, kv_cache, **options)


class CPULayer(Layer):
    """The kernels bound to one layer's cache, so that a call only fills in what changes. Not for
    concurrent calls.

    Args:
        kernel: the variant's kernels.
        kv_cache: the layer's cache, the last two dimensions contiguous.
        options: those of `Layer`.
    """

    def __init__(self, kernel: CPUKernel, kv_cache: Tensor, **options: Any) -> None:
        super().__init__(kernel.variant, kv_cache, **options)
        num_kv_heads, block_size, content = kv_cache.shape[1:]
        if kv_cache.stride()[2:] != (content, 1):
            raise ValueError("the interior of the cache's blocks must be contiguous")
        if reason := kernel.unsupported(self.head_size, block_size, kv_cache.dtype):
            raise ValueError(f"the CPU kernels do not support {reason}")
        shape = CacheShape(
            kv_cache.data_ptr(),
            kv_cache.stride(0),
            kv_cache.stride(1),
            block_size,
            self.head_size,
            num_kv_heads,
        )
        self._write = WriteCall(cache=shape, cache_format=FORMATS[kv_cache.dtype])
        self._call = AttendCall(
            cache=shape,
            values=kernel.values,
            scale=self.scale,
            num_heads=self.num_heads,
            window=self.window or 0,
            cache_format=FORMATS[kv_cache.dtype],
        )
        # The call points into these.
        tensors = [tensor.float().contiguous() for tensor in self.learned.values()]
        self._tensors = tensors, (c_void_p * max(1, len(tensors)))(*(t.data_ptr() for t in tensors))
        self._call.learned = self._tensors[1]
        self.run_attend = functools.partial(kernel.library.attnserve_attend, byref(self._call))
        """The C function, on what `attend` filled in."""
        self.run_write = functools.partial(kernel.library.attnserve_write, byref(self._write))
        """The C function, on what `write_cache` filled in."""

    def write_cache(self, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        if key.dtype != self.kv_cache.dtype:
            key, value = key.to(self.kv_cache.dtype), value.to(self.kv_cache.dtype)
        if slot_mapping.dtype != torch.int64:
            slot_mapping = slot_mapping.long()
        call = self._write
        key, call.key_stride = head_rows(key)
        value, call.value_stride = head_rows(value)
        call.key = key.data_ptr()
        call.value = value.data_ptr()
        call.slot_mapping = slot_mapping.data_ptr()
        call.num_tokens = slot_mapping.shape[0]
        call.threads = torch.get_num_threads()
        self.run_write()

    def attend(self, query: Tensor, batch: Batch, out: Tensor) -> None:
        call = self._call
        query, call.query_stride = head_rows(query)
        call.query = query.data_ptr()
        call.query_format = FORMATS[query.dtype]
        call.out = out.data_ptr()
        call.out_stride = out.stride(0)
        call.out_format = FORMATS[out.dtype]
        call.batch = batch.address
        if self.run_attend():
            raise MemoryError("no memory for the attention kernel's scratch space")
