"""A variant's C++ kernels, called through ctypes with one struct a call: its fields are those in
C++, in the same order."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, byref, c_float, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from attn_kernels.batch import Batch, heads_together
from attn_kernels.checks import (
    VALUES,
    check_batch,
    check_gate_rows,
    check_out,
    check_rows,
    check_slots,
)
from attn_kernels.cpu.build import open_library
from attn_kernels.kv_quant import KVFormat
from attn_kernels.paged import Layer
from attn_kernels.pruning import PageShape, PrunedLayer
from attn_kernels.variant import Variant

HEAD_SIZES = range(32, 257, 16)
LONGEST = 2**31 - 1
"""Tokens of a context: C++ counts them in 32 bits."""
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Of tensors, and of a cache that is not quantized."""
NO_MEMORY = "no memory for the attention kernel's scratch space"
QUANTIZED = {KVFormat(8): 3, KVFormat(4): 4}
"""Of a quantized cache."""


def fields(kind: Any, names: str) -> list[tuple[str, Any]]:
    """Return a struct's fields of one type, as a line of C++ declares them."""
    return [(name, kind) for name in names.split()]


class CacheShape(ctypes.Structure):
    """`CacheShape` of cache.hpp."""

    _fields_ = (
        *fields(c_void_p, "data"),
        *fields(c_int64, "block_stride head_stride"),
        *fields(c_int32, "block_size head_size num_kv_heads"),
    )


class AttendCall(ctypes.Structure):
    """`AttendCall` of call.hpp."""

    _fields_ = (
        *fields(CacheShape, "cache"),
        *fields(c_void_p, "query out"),
        *fields(c_int64, "query_stride out_stride"),
        *fields(c_void_p, "batch"),
        *fields(POINTER(c_float), "values"),
        *fields(POINTER(c_void_p), "learned"),
        *fields(c_void_p, "alibi_slopes selecting"),
        *fields(c_int64, "selecting_stride"),
        *fields(c_float, "scale soft_cap"),
        *fields(c_int32, "num_heads window selector query_format out_format cache_format"),
    )


class WriteCall(ctypes.Structure):
    """`WriteCall` of kernel.cpp."""

    _fields_ = (
        *fields(CacheShape, "cache"),
        *fields(c_void_p, "key value selecting"),
        *fields(c_int64, "key_stride value_stride selecting_stride"),
        *fields(c_void_p, "slot_mapping"),
        *fields(c_int64, "num_tokens"),
        *fields(c_int32, "key_format value_format cache_format threads"),
    )


class GateCall(ctypes.Structure):
    """`GateCall` of gates.hpp."""

    _fields_ = (
        *fields(CacheShape, "cache"),
        *fields(c_void_p, "gates"),
        *fields(c_int64, "gate_stride"),
        *fields(c_void_p, "batch"),
        *fields(c_int32, "num_heads window cache_format"),
    )


class PrunedCall(ctypes.Structure):
    """`PrunedCall` of pruned.hpp."""

    _fields_ = (
        *fields(c_void_p, "pages"),
        *fields(c_int64, "page_stride"),
        *fields(c_void_p, "query key value out"),
        *fields(c_void_p, "selecting_query selecting_key"),
        *fields(c_int64, "query_stride key_stride value_stride out_stride"),
        *fields(c_int64, "selecting_query_stride selecting_key_stride"),
        *fields(c_void_p, "batch"),
        *fields(POINTER(c_float), "values"),
        *fields(c_float, "scale"),
        *fields(c_int32, "num_heads num_kv_heads head_size budget"),
        *fields(c_int32, "query_format out_format page_format"),
    )


class CPUKernel:
    """Paged attention of one variant.

    The cache is that of `attn_kernels.paged`, but the interior of each block of each KV head is in
    packed order (cache.hpp): fill it with `CPULayer.write_cache` only.

    Threads: as many as torch uses. Scores and sums are float32.

    Args:
        variant: the attention function.
        library: its shared library.
        isa: the library's instruction set.
        quantized: whether it is for quantized caches, else for all others.
    """

    def __init__(self, variant: Variant, library: Path, isa: str, quantized: bool = False) -> None:
        self.variant, self.isa, self.quantized = variant, isa, quantized
        structs = (AttendCall, WriteCall, PrunedCall, GateCall)
        attend, write, pruned, gate = map(ctypes.sizeof, structs)
        expected = attend * 1000000 + write * 1000 + pruned + gate
        self.library = open_library(library, "attnserve_abi", expected)
        numbers = variant.numbers()
        self.values = (c_float * max(1, len(numbers)))(*numbers)

    def unsupported(
        self, head_size: int, block_size: int, dtype: torch.dtype, kv_format: KVFormat | None = None
    ) -> str | None:
        """Return what keeps these kernels from serving a cache of this shape; None if nothing
        does."""
        if head_size not in HEAD_SIZES:
            return f"head size {head_size} (they take 32 to 256 in steps of 16)"
        if block_size % 16:
            return f"block size {block_size} (they take multiples of 16)"
        if (kv_format is not None) != self.quantized:
            return "quantized caches" if kv_format else "any but quantized caches"
        return None if kv_format or dtype in FORMATS else f"a KV cache of {dtype}"

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
        reason = kernel.unsupported(self.head_size, block_size, kv_cache.dtype, self.kv_format)
        if reason:
            raise ValueError(f"the CPU kernels do not support {reason}")
        cache_format = QUANTIZED[self.kv_format] if self.kv_format else FORMATS[kv_cache.dtype]
        shape = CacheShape(
            kv_cache.data_ptr(),
            kv_cache.stride(0),
            kv_cache.stride(1),
            block_size,
            self.head_size,
            num_kv_heads,
        )
        self._write = WriteCall(cache=shape, cache_format=cache_format)
        self._call = AttendCall(
            cache=shape,
            values=kernel.values,
            scale=self.scale,
            soft_cap=self.soft_cap or 0.0,
            num_heads=self.num_heads,
            window=min(self.window or 0, LONGEST),
            selector=self.selector,
            cache_format=cache_format,
        )
        self._gates = GateCall(
            cache=shape,
            num_heads=self.num_heads,
            window=self._call.window,
            cache_format=cache_format,
        )
        # The call points into these.
        tensors = [tensor.float().contiguous() for tensor in self.learned.values()]
        pointers = (c_void_p * max(1, len(tensors)))(*(t.data_ptr() for t in tensors))
        self._call.learned = pointers
        if self.alibi_slopes is not None:
            tensors.append(self.alibi_slopes.float().contiguous())
            self._call.alibi_slopes = tensors[-1].data_ptr()
        self._tensors = tensors, pointers
        self._library = kernel.library
        self._both = byref(self._write), byref(self._call)
        self._layout: tuple[Any, ...] | None = None
        """Of the last step, whose calls need new pointers only where the next one's is the same."""

    def write_cache(
        self, key: Tensor, value: Tensor, slot_mapping: Tensor, selecting: Tensor | None = None
    ) -> None:
        self._layout = None
        if self.kv_format is None and key.dtype != self.kv_cache.dtype:
            key, value = key.to(self.kv_cache.dtype), value.to(self.kv_cache.dtype)
        slot_mapping = slot_mapping.long().contiguous()
        num_tokens, num_kv_heads = slot_mapping.numel(), self.kv_cache.shape[1]
        check_rows("key", key, num_tokens, num_kv_heads, self.head_size)
        check_rows("value", value, num_tokens, num_kv_heads, self.head_size)
        if VALUES:
            check_slots(slot_mapping, self.kv_cache.shape[0] * self.kv_cache.shape[2])
        key, value = heads_together(key), heads_together(value)
        call = self._write
        call.key, call.key_stride = key.data_ptr(), key.stride(0)
        call.value, call.value_stride = value.data_ptr(), value.stride(0)
        call.key_format, call.value_format = FORMATS[key.dtype], FORMATS[value.dtype]
        call.slot_mapping, call.num_tokens = slot_mapping.data_ptr(), num_tokens
        if self.selector:
            keys = selecting_rows(selecting, num_tokens, self.head_size)[:, 1]
            keys = keys.to(self.kv_cache.dtype)
            call.selecting, call.selecting_stride = keys.data_ptr(), keys.stride(0)
        call.threads = torch.get_num_threads()
        self._library.attnserve_write(byref(call))

    def write_gates(self, gates: Tensor, batch: Batch) -> None:
        check_gate_rows(gates, batch.num_tokens, self.num_heads)
        if VALUES:
            num_blocks, _, block_size, _ = self.kv_cache.shape
            check_batch(batch, num_blocks, block_size, self.window or 0)
        call = self._gates
        gates = gates.float()
        gates = gates if gates.stride(1) == 1 else gates.contiguous()
        call.gates, call.gate_stride = gates.data_ptr(), gates.stride(0)
        call.batch = batch.address
        self._library.attnserve_write_gates(byref(call))

    def attend(
        self, query: Tensor, batch: Batch, out: Tensor, selecting: Tensor | None = None
    ) -> None:
        self._layout = None
        check_rows("query", query, batch.num_tokens, self.num_heads, self.head_size)
        check_out(out, batch.num_tokens, self.num_heads, self.head_size)
        if VALUES:
            num_blocks, _, block_size, _ = self.kv_cache.shape
            check_batch(batch, num_blocks, block_size, self.window or 0)
        query = heads_together(query)
        if self.selector:
            queries = selecting_rows(selecting, batch.num_tokens, self.head_size)[:, 0]
            queries = queries.to(query.dtype)
            self._call.selecting = queries.data_ptr()
            self._call.selecting_stride = queries.stride(0)
        run(self._library.attnserve_attend, self._call, query, batch, out)

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch: Batch,
        out: Tensor,
        selecting: Tensor | None = None,
    ) -> None:
        layout = (
            *(batch.num_tokens, batch.slot_mapping.shape),
            *(query.shape, key.shape, value.shape, out.shape),
            *(query.stride(), key.stride(), value.stride(), out.stride()),
            *(query.dtype, key.dtype, value.dtype, out.dtype),
        )
        if layout != self._layout:
            super().step(query, key, value, batch, out, selecting)
            pointers = self._write.key, self._write.value, self._call.query
            given = key.data_ptr(), value.data_ptr(), query.data_ptr()
            if selecting is None and pointers == given:  # nothing had to be copied
                self._layout = layout
            return
        if VALUES:
            num_blocks, _, block_size, _ = self.kv_cache.shape
            check_slots(batch.slot_mapping, num_blocks * block_size)
            check_batch(batch, num_blocks, block_size, self.window or 0)
        write, attend = self._write, self._call
        write.key, write.value = key.data_ptr(), value.data_ptr()
        write.slot_mapping, attend.batch = batch.slots_address, batch.address
        attend.query, attend.out = query.data_ptr(), out.data_ptr()
        if self._library.attnserve_step(*self._both):
            raise MemoryError(NO_MEMORY)


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
        self._run = kernel.library.attnserve_attend_pruned

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch: Batch,
        out: Tensor,
        selecting: Tensor | None = None,
    ) -> None:
        call, num_tokens = self._call, batch.num_tokens
        num_kv_heads, head_size = self.shape.num_kv_heads, self.shape.head_size
        check_rows("query", query, num_tokens, self.num_heads, head_size)
        check_rows("key", key, num_tokens, num_kv_heads, head_size)
        check_rows("value", value, num_tokens, num_kv_heads, head_size)
        check_out(out, num_tokens, self.num_heads, head_size)
        if VALUES:
            check_batch(batch, self.pages.shape[0], None)
        key = heads_together(key.to(self.shape.dtype))
        value = heads_together(value.to(self.shape.dtype))
        call.key, call.key_stride = key.data_ptr(), key.stride(0)
        call.value, call.value_stride = value.data_ptr(), value.stride(0)
        query = heads_together(query)
        if self.shape.selector:
            queries, keys = selecting_rows(selecting, num_tokens, head_size).unbind(1)
            queries, keys = queries.to(query.dtype), keys.to(self.shape.dtype)
            call.selecting_query, call.selecting_query_stride = (
                queries.data_ptr(),
                queries.stride(0),
            )
            call.selecting_key, call.selecting_key_stride = keys.data_ptr(), keys.stride(0)
        run(self._run, call, query, batch, out)


def selecting_rows(selecting: Tensor | None, num_tokens: int, head_size: int) -> Tensor:
    """Return head 0's queries and keys `[>= num_tokens, 2, head_size]`, which a selector needs."""
    if selecting is None:
        raise ValueError("head 0 is another rank's: its queries and keys are missing")
    check_rows("selecting", selecting, num_tokens, 2, head_size)
    return heads_together(selecting)


def run(function: Any, call: Any, query: Tensor, batch: Batch, out: Tensor) -> None:
    """Call a C++ function that attends, on a struct in which only these are not filled in."""
    call.query, call.query_stride = query.data_ptr(), query.stride(0)
    call.query_format, call.out_format = FORMATS[query.dtype], FORMATS[out.dtype]
    call.out, call.out_stride = out.data_ptr(), out.stride(0)
    call.batch = batch.address
    if function(byref(call)):
        raise MemoryError(NO_MEMORY)
