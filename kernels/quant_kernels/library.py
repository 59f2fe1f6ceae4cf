"""The C++ kernels, one library for each number of bits, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import logging
import os
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path

import torch

from attn_kernels.cpu.build import HERE as ATTENTION
from attn_kernels.cpu.build import BuildError, compile_library, usable_isas

HERE = Path(__file__).parent
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3, None: 4}

logger = logging.getLogger(__name__)


class Call(ctypes.Structure):
    """`Call` of packed.cpp."""

    _fields_ = (
        ("words", c_void_p),
        ("scales", c_void_p),
        ("zeros", c_void_p),
        ("x", c_void_p),
        ("out", c_void_p),
        ("outputs", c_int64),
        ("inputs", c_int64),
        ("group_size", c_int64),
        ("x_stride", c_int64),
        ("rows", c_int64),
        ("scale_format", c_int32),
        ("zero_format", c_int32),
        ("format", c_int32),
        ("threads", c_int32),
    )


def build(bits: int, isa: str) -> Path:
    """Return the library for one number of bits, built if need be (some seconds, once a machine).

    Raises:
        BuildError: it cannot be built.
    """
    source = HERE / "packed.cpp"
    headers = {ATTENTION / name for name in ("simd.hpp", "matmul.hpp", "amx.hpp", "arena.hpp")}
    return compile_library(
        source,
        isa,
        name=f"packed{bits}",
        define=f"WEIGHT_BITS={bits}",
        reads={source, *headers},
        options=(f"-I{ATTENTION}",),
    )


def load(bits: int) -> ctypes.CDLL | None:
    """Return the kernels for one number of bits and `$ATTNSERVE_CPU_ISA`, else the best instruction
    set; None, after one warning that says why, if nothing can be built."""
    return _load(bits, os.environ.get("ATTNSERVE_CPU_ISA"))


@functools.cache
def _load(bits: int, chosen: str | None) -> ctypes.CDLL | None:
    if chosen and chosen not in usable_isas():
        raise ValueError(f"this processor has no {chosen}: use one of {', '.join(usable_isas())}")
    why = ""
    for isa in (chosen,) if chosen else usable_isas():
        try:
            return _opened(build(bits, isa))
        except BuildError as error:
            why = str(error)
    logger.warning(
        "attnserve: weights of %s bits run in torch operations, many times slower than CPU "
        "kernels: %s",
        bits,
        why,
    )
    return None


def _opened(path: Path) -> ctypes.CDLL:
    """Return the library, if it fits `Call`."""
    try:
        library = ctypes.CDLL(str(path))
    except OSError as error:
        raise BuildError(f"{path} cannot be loaded ({error}): delete it") from None
    if library.attnserve_packed_abi() != ctypes.sizeof(Call):
        raise BuildError(f"{path} does not fit this version of attnserve: delete it")
    return library
