"""A variant's C++ kernels, called through ctypes with one struct a call."""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Mapping
from ctypes import byref, c_float, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_kernels.batch import Batch
from attn_kernels.cpu.build import BuildError
from attn_kernels.cpu.structs import (
    FORMATS,
    AttendCall,
    CacheShape,
    PrunedCall,
    WriteCall,
    head_rows,
)
from attn_kernels.paged import STATE_BYTES
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
        try:
            self.library = ctypes.CDLL(str(library))
        except OSError as error:
            raise BuildError(f"{library} cannot be loaded ({error}): delete it") from None
        sizes = ctypes.sizeof(AttendCall), ctypes.sizeof(WriteCall), ctypes.sizeof(PrunedCall)
        expected = sizes[0] * 1000000 + sizes[1] * 1000 + sizes[2]
        if self.library.attnserve_abi() != expected:
            raise BuildError(f"{library} does not fit this version of attnserve: delete it")
        numbers = variant.numbers()
        self.values = (c_float * max(1, len(numbers)))(*numbers)

    def head_size(self, content: int, dtype: torch.dtype) -> int:
        """Return the head size of a cache whose slots have `content` elements."""
        state = STATE_BYTES // dtype.itemsize if self.variant.stateful else 0
        return (content - state) // 2

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


class CPULayer:
    """The kernels bound to one layer's cache, so that a call only fills in what changes. Not for
    concurrent calls.

    Args:
        kernel: the variant's kernels.
        kv_cache: `[num_blocks, num_kv_heads, block_size, content]`, the last two dimensions
            contiguous.
        num_heads: query heads, a multiple of `num_kv_heads`.
        scale: factor of the raw scores, where the variant uses it.
        window: sliding window in tokens, the query's own included.
        learned: the variant's per-head tensors, each `[num_heads]`, as they are now.

    Raises:
        ValueError: the kernels do not support such a cache.
        KeyError: a learned tensor is missing.
    """

    def __init__(
        self,
        kernel: CPUKernel,
        kv_cache: Tensor,
        *,
        num_heads: int,
        scale: float,
        window: int | None = None,
        learned: Mapping[str, Tensor] | None = None,
    ) -> None:
        num_kv_heads, block_size, content = kv_cache.shape[1:]
        if kv_cache.stride()[2:] != (content, 1):
            raise ValueError("the interior of the cache's blocks must be contiguous")
        self.kv_cache = kv_cache
        self.head_size = kernel.head_size(content, kv_cache.dtype)
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
            scale=scale,
            num_heads=num_heads,
            window=window or 0,
            cache_format=FORMATS[kv_cache.dtype],
        )
        # The call points into these.
        tensors = [(learned or {})[n].float().contiguous() for n in kernel.variant.learned]
        self._learned = tensors, (c_void_p * max(1, len(tensors)))(*(t.data_ptr() for t in tensors))
        self._call.learned = self._learned[1]
        self.run_attend = functools.partial(kernel.library.attnserve_attend, byref(self._call))
        """The C function, on what `attend` filled in."""
        self.run_write = functools.partial(kernel.library.attnserve_write, byref(self._write))
        """The C function, on what `write_cache` filled in."""

    def write_cache(self, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Store keys and values of new tokens, in place; their accumulators start at 0.

        Args:
            key, value: `[>= num_tokens, num_kv_heads, head_size]`.
            slot_mapping: `[num_tokens]` int64, `block * block_size + offset`, or -1 for padding.
        """
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

    def attend(
        self,
        query: Tensor,
        batch: Batch,
        out: Tensor,
    ) -> None:
        """Attend with a batch, decode and prefill mixed; see `attn_kernels.paged.TorchLayer`.

        Args:
            query: `[num_tokens, num_heads, head_size]`, float32, bfloat16 or float16.
            batch: its requests.
            out: `[>= num_tokens, num_heads, head_size]`, written in place; its heads side by side.

        Raises:
            MemoryError: no memory for the kernel's scratch space.
        """
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
