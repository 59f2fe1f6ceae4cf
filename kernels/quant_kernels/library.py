"""The C++ kernels, one library for each number of bits, called through ctypes."""

from __future__ import annotations

import ctypes
import functools
import logging
from ctypes import c_int32, c_int64, c_void_p
from pathlib import Path

import torch

from attn_kernels.cpu.build import HERE as ATTENTION
from attn_kernels.cpu.build import BuildError, chosen_isas, compile_library, open_library
from attn_kernels.cpu.kernel import fields

HERE = Path(__file__).parent
FORMATS = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.uint8: 3, None: 4}

logger = logging.getLogger(__name__)


class ProductCall(ctypes.Structure):
    """`ProductCall` of packed.cpp."""

    _fields_ = (
        *fields(c_void_p, "words scales zeros x out"),
        *fields(c_int64, "outputs inputs group_size x_stride rows"),
        *fields(c_int32, "scale_format zero_format format threads"),
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
    return _load(bits, chosen_isas())


@functools.cache
def _load(bits: int, isas: tuple[str, ...]) -> ctypes.CDLL | None:
    why = ""
    for isa in isas:
        try:
            size = ctypes.sizeof(ProductCall)
            return open_library(build(bits, isa), "attnserve_packed_abi", size)
        except BuildError as error:
            why = str(error)
    logger.warning(
        "attnserve: weights of %s bits run in torch operations, many times slower than CPU "
        "kernels: %s",
        bits,
        why,
    )
    return None
