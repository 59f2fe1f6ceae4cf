"""A variant's C++ kernels, called through ctypes with one struct a call."""

from __future__ import annotations

import ctypes
import dataclasses
import math
from collections.abc import Mapping
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from attn_kernels.paged import STATE_BYTES
from attn_kernels.variant import Variant

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}

HEAD_SIZES = range(32, 257, 16)


class _CacheShape(ctypes.Structure):
    _fields_ = (
        ("data", c_void_p),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
        ("block_size", c_int32),
        ("head_size", c_int32),
        ("num_kv_heads", c_int32),
    )


class _Call(ctypes.Structure):
    """`Call` of attention.hpp."""

    _fields_ = (
        ("cache", _CacheShape),
        ("query", c_void_p),
        ("out", c_void_p),
        ("query_stride", c_int64),
        ("out_stride", c_int64),
        ("block_table", c_void_p),
        ("block_table_stride", c_int64),
        ("query_start_loc", c_void_p),
        ("seq_lens", c_void_p),
        ("values", POINTER(c_float)),
        ("learned", POINTER(c_void_p)),
        ("scale", c_float),
        ("num_reqs", c_int32),
        ("num_heads", c_int32),
        ("window", c_int32),
        ("query_format", c_int32),
        ("out_format", c_int32),
        ("cache_format", c_int32),
        ("threads", c_int32),
    )


class _Write(ctypes.Structure):
    """`Write` of kernel.cpp."""

    _fields_ = (
        ("cache", _CacheShape),
        ("key", c_void_p),
        ("value", c_void_p),
        ("key_stride", c_int64),
        ("value_stride", c_int64),
        ("slot_mapping", c_void_p),
        ("num_tokens", c_int64),
        ("element_size", c_int32),
        ("threads", c_int32),
    )


def _as_float(value: float | bool | None) -> float:
    return math.nan if value is None else float(value)


def _rows(x: Tensor, head_size: int) -> Tensor:
    """`x` `[tokens, heads, head_size]` with its heads side by side in memory, copied if need be."""
    return x if x.stride(2) == 1 and x.stride(1) == head_size else x.contiguous()


class CPUKernel:
    """Paged attention of one variant. The cache is that of `attn_kernels.paged`, but the interior of
    each block of each KV head is in packed order (cache.hpp): fill it with `write_cache` only.

    Threads: as many as torch uses. Scores and sums are float32.
    """

    def __init__(self, variant: Variant, library: Path, isa: str) -> None:
        self.variant = variant
        self.isa = isa
        self.library = ctypes.CDLL(str(library))
        expected = ctypes.sizeof(_Call) * 1000 + ctypes.sizeof(_Write)
        if self.library.attnserve_abi() != expected:
            raise RuntimeError(f"{library} does not fit this version of attnserve: delete it")
        fields = [_as_float(getattr(variant, f.name)) for f in dataclasses.fields(variant)]
        self._values = (c_float * max(1, len(fields)))(*fields)

    def unsupported(self, head_size: int, block_size: int, dtype: torch.dtype) -> str | None:
        """What keeps these kernels from serving a cache of this shape; None if nothing does."""
        if head_size not in HEAD_SIZES:
            return f"head size {head_size} (they take 32 to 256 in steps of 16)"
        if block_size % 16:
            return f"block size {block_size} (they take multiples of 16)"
        return None if dtype in FORMATS else f"a KV cache of {dtype}"

    def _shape(self, kv_cache: Tensor) -> _CacheShape:
        num_kv_heads, block_size, content = kv_cache.shape[1:]
        state = STATE_BYTES // kv_cache.element_size() if self.variant.stateful else 0
        return _CacheShape(
            kv_cache.data_ptr(),
            kv_cache.stride(0),
            kv_cache.stride(1),
            block_size,
            (content - state) // 2,
            num_kv_heads,
        )

    def write_cache(
        self, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Store keys and values of new tokens, in place; their accumulators start at 0.

        Args:
            key, value: `[>= num_tokens, num_kv_heads, head_size]`.
            kv_cache: the layer's cache, its blocks' interiors contiguous.
            slot_mapping: `[num_tokens]` int64, `block * block_size + offset`, or -1 for padding.
        """
        dtype, head_size = kv_cache.dtype, key.shape[2]
        key, value = _rows(key.to(dtype), head_size), _rows(value.to(dtype), head_size)
        slot_mapping = slot_mapping.long()
        self.library.attnserve_write(
            ctypes.byref(
                _Write(
                    self._shape(kv_cache),
                    key.data_ptr(),
                    value.data_ptr(),
                    key.stride(0),
                    value.stride(0),
                    slot_mapping.data_ptr(),
                    slot_mapping.shape[0],
                    kv_cache.element_size(),
                    torch.get_num_threads(),
                )
            )
        )

    def paged_attention(
        self,
        query: Tensor,
        kv_cache: Tensor,
        block_table: Tensor,
        query_start_loc: Tensor,
        seq_lens: Tensor,
        *,
        scale: float,
        window: int | None = None,
        learned: Mapping[str, Tensor] | None = None,
        out: Tensor,
    ) -> None:
        """Attention of a batch, decode and prefill mixed; see `attn_kernels.paged.paged_attention`.

        Args:
            query: `[num_tokens, num_heads, head_size]`, any of the three dtypes.
            kv_cache: the layer's cache, filled by `write_cache`.
            block_table: `[num_reqs, max_blocks]` int32.
            query_start_loc: `[num_reqs + 1]` int32.
            seq_lens: `[num_reqs]` int32.
            scale, window, learned: as in the torch path.
            out: `[>= num_tokens, num_heads, head_size]`, written in place; heads side by side.

        Raises:
            MemoryError: no memory for the kernel's scratch space.
        """
        num_heads, head_size = query.shape[1:]
        query = _rows(query, head_size)
        tensors = [(learned or {})[name].float().contiguous() for name in self.variant.learned]
        pointers = (c_void_p * max(1, len(tensors)))(*(t.data_ptr() for t in tensors))
        failed = self.library.attnserve_attend(
            ctypes.byref(
                _Call(
                    self._shape(kv_cache),
                    query.data_ptr(),
                    out.data_ptr(),
                    query.stride(0),
                    out.stride(0),
                    block_table.data_ptr(),
                    block_table.stride(0),
                    query_start_loc.data_ptr(),
                    seq_lens.data_ptr(),
                    self._values,
                    pointers,
                    scale,
                    seq_lens.shape[0],
                    num_heads,
                    window or 0,
                    FORMATS[query.dtype],
                    FORMATS[out.dtype],
                    FORMATS[kv_cache.dtype],
                    torch.get_num_threads(),
                )
            )
        )
        if failed:
            raise MemoryError("no memory for the attention kernel's scratch space")
