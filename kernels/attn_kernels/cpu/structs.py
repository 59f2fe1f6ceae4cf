"""Arguments of the C++ entry points: the structs' fields, in the same order."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


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
        *fields(c_float, "scale"),
        *fields(c_int32, "num_heads window query_format out_format cache_format"),
    )


class WriteCall(ctypes.Structure):
    """`WriteCall` of kernel.cpp."""

    _fields_ = (
        *fields(CacheShape, "cache"),
        *fields(c_void_p, "key value"),
        *fields(c_int64, "key_stride value_stride"),
        *fields(c_void_p, "slot_mapping"),
        *fields(c_int64, "num_tokens"),
        *fields(c_int32, "cache_format threads"),
    )


class PrunedCall(ctypes.Structure):
    """`PrunedCall` of pruned.hpp."""

    _fields_ = (
        *fields(c_void_p, "pages"),
        *fields(c_int64, "page_stride"),
        *fields(c_void_p, "query key value out"),
        *fields(c_int64, "query_stride key_stride value_stride out_stride"),
        *fields(c_void_p, "batch"),
        *fields(POINTER(c_float), "values"),
        *fields(c_float, "scale"),
        *fields(c_int32, "num_heads num_kv_heads head_size budget"),
        *fields(c_int32, "query_format out_format page_format"),
    )


def head_rows(x: Tensor) -> tuple[Tensor, int]:
    """Return `x` `[tokens, heads, head_size]` with its heads side by side in memory, copied if need
    be, and the distance of its tokens in elements."""
    token, head, dim = x.stride()
    if dim != 1 or head != x.shape[2]:
        x = x.contiguous()
        token = x.stride(0)
    return x, token
