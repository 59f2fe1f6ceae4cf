"""Arguments of the C++ entry points: the structs' fields, in the same order."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_float, c_int32, c_int64, c_void_p

import torch
from torch import Tensor

FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


class CacheShape(ctypes.Structure):
    """`CacheShape` of cache.hpp."""

    _fields_ = (
        ("data", c_void_p),
        ("block_stride", c_int64),
        ("head_stride", c_int64),
        ("block_size", c_int32),
        ("head_size", c_int32),
        ("num_kv_heads", c_int32),
    )


class AttendCall(ctypes.Structure):
    """`AttendCall` of call.hpp."""

    _fields_ = (
        ("cache", CacheShape),
        ("query", c_void_p),
        ("out", c_void_p),
        ("query_stride", c_int64),
        ("out_stride", c_int64),
        ("batch", c_void_p),
        ("values", POINTER(c_float)),
        ("learned", POINTER(c_void_p)),
        ("scale", c_float),
        ("num_heads", c_int32),
        ("window", c_int32),
        ("query_format", c_int32),
        ("out_format", c_int32),
        ("cache_format", c_int32),
    )


class WriteCall(ctypes.Structure):
    """`WriteCall` of kernel.cpp."""

    _fields_ = (
        ("cache", CacheShape),
        ("key", c_void_p),
        ("value", c_void_p),
        ("key_stride", c_int64),
        ("value_stride", c_int64),
        ("slot_mapping", c_void_p),
        ("num_tokens", c_int64),
        ("cache_format", c_int32),
        ("threads", c_int32),
    )


class PrunedCall(ctypes.Structure):
    """`PrunedCall` of pruned.hpp."""

    _fields_ = (
        ("pages", c_void_p),
        ("page_stride", c_int64),
        ("query", c_void_p),
        ("key", c_void_p),
        ("value", c_void_p),
        ("out", c_void_p),
        ("query_stride", c_int64),
        ("key_stride", c_int64),
        ("value_stride", c_int64),
        ("out_stride", c_int64),
        ("batch", c_void_p),
        ("values", POINTER(c_float)),
        ("scale", c_float),
        ("num_heads", c_int32),
        ("num_kv_heads", c_int32),
        ("head_size", c_int32),
        ("budget", c_int32),
        ("query_format", c_int32),
        ("out_format", c_int32),
        ("page_format", c_int32),
    )


def head_rows(x: Tensor) -> tuple[Tensor, int]:
    """Return `x` `[tokens, heads, head_size]` with its heads side by side in memory, copied if need
    be, and the distance of its tokens in elements."""
    token, head, dim = x.stride()
    if dim != 1 or head != x.shape[2]:
        x = x.contiguous()
        token = x.stride(0)
    return x, token
