"""Products and lookups with packed matrices, as functions of tensors that torch can compile: the
C++ kernels, one library for each number of bits, called through ctypes; torch operations where
nothing can be built; and on a GPU `quant_kernels.triton`."""

from __future__ import annotations

import ctypes
import functools
import logging
from ctypes import byref, c_int32, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from attn_kernels.cpu.build import HERE as ATTENTION
from attn_kernels.cpu.build import best, chosen_isas, compile_library, open_library
from attn_kernels.cpu.kernel import fields
from quant_kernels.panels import Panels, check, dequantize

HERE = Path(__file__).parent
FORMATS = {
    torch.float32: 0,
    torch.bfloat16: 1,
    torch.float16: 2,
    torch.uint8: 3,
    None: 4,
    torch.int8: 5,
}

ACTIVATIONS = (torch.float32, torch.bfloat16, torch.float16)

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
    size = ctypes.sizeof(ProductCall)
    library, why = best(
        f"a weight of {bits} bits",
        isas,
        lambda isa: open_library(build(bits, isa), "attnserve_packed_abi", size),
    )
    if library is None:
        logger.warning(
            "attnserve: weights of %s bits run in torch operations, many times slower than CPU "
            "kernels: %s",
            bits,
            why,
        )
    return library


# Compiled graphs hold these as operators, whose arguments are tensors and numbers; otherwise the
# functions are called directly, which is some microseconds less.
LIBRARY = torch.library.Library("attnserve", "FRAGMENT")
WEIGHT = (
    "Tensor words, Tensor scales, Tensor? zeros, int bits, int group_size, int outputs, int inputs"
)


def multiply(x: Tensor, weight: Panels) -> Tensor:
    """Return `x @ weight.T`, summed in float32.

    Args:
        x: `[..., inputs]`, float32, bfloat16 or float16, on a CPU or a GPU.
        weight: the matrix, there too.

    Returns:
        `[..., outputs]` in x's dtype.

    Raises:
        MemoryError: no memory for scratch space.
    """
    if torch.compiler.is_compiling():
        product: Tensor = torch.ops.attnserve.packed_multiply(x, *weight)
        return product
    return _multiply(x, weight)


def gather(ids: Tensor, weight: Panels, dtype: torch.dtype) -> Tensor:
    """Return rows of a matrix.

    Args:
        ids: int64 `[...]`.
        weight: the matrix, on the same device.
        dtype: of the rows: float32, bfloat16 or float16.

    Returns:
        `[..., inputs]` in `dtype`. A row that is not there is 0, and nothing is read for it: an
        error would end a server, and a GPU can raise none without being waited for.
    """
    if torch.compiler.is_compiling():
        rows: Tensor = torch.ops.attnserve.packed_gather(ids, dtype, *weight)
        return rows
    return _gather(ids, weight, dtype)


def _multiply(x: Tensor, weight: Panels) -> Tensor:
    if x.is_cuda:
        from quant_kernels import triton

        return triton.multiply(x, weight)
    check(weight)
    if x.shape[-1] != weight.inputs or x.dtype not in ACTIVATIONS:
        raise ValueError(
            f"x is {list(x.shape)} in {x.dtype}, not [..., {weight.inputs}] in float32, bfloat16 "
            "or float16"
        )
    library = load(weight.bits)
    if library is None:
        return linear(x, dequantize(weight).to(x.dtype))
    rows = x.reshape(-1, weight.inputs)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.outputs)
    call = _call(weight, rows, out, rows.stride(0), len(rows))
    if library.attnserve_packed_multiply(byref(call)):
        raise MemoryError("no memory for the scratch space of a product with packed weights")
    return out


def _gather(ids: Tensor, weight: Panels, dtype: torch.dtype) -> Tensor:
    if ids.is_cuda:
        from quant_kernels import triton

        return triton.gather(ids, weight, dtype)
    check(weight)
    if dtype not in ACTIVATIONS or ids.is_floating_point():
        raise ValueError(f"ids in {ids.dtype}, rows in {dtype}")
    ids = ids.long()
    library = load(weight.bits)
    if library is None:
        inside = (ids >= 0) & (ids < weight.outputs)
        matrix = dequantize(weight).to(dtype)
        return embedding(ids.where(inside, 0), matrix) * inside.unsqueeze(-1)
    ids = ids.contiguous()
    out = torch.empty(*ids.shape, weight.inputs, dtype=dtype)
    if library.attnserve_packed_gather(byref(_call(weight, ids, out, 0, ids.numel()))):
        # An id is out of range, and nothing was read.
        inside = (ids >= 0) & (ids < weight.outputs)
        rows = _gather(ids.where(inside, 0), weight, dtype)
        return rows.masked_fill_(~inside.unsqueeze(-1), 0)
    return out


def _call(weight: Panels, given: Tensor, out: Tensor, stride: int, count: int) -> ProductCall:
    """Return what the C++ kernels take: `given` are `count` rows, `stride` elements apart, or
    `count` row numbers."""
    zeros = weight.zeros
    return ProductCall(
        weight.words.data_ptr(),
        weight.scales.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        given.data_ptr(),
        out.data_ptr(),
        weight.outputs,
        weight.inputs,
        weight.group_size,
        stride,
        count,
        FORMATS[weight.scales.dtype],
        FORMATS[None if zeros is None else zeros.dtype],
        FORMATS[out.dtype],
        torch.get_num_threads(),
    )


def _register(name: str, arguments: str, run: Any, shape: Any) -> None:
    """Define an operator: `run` computes it, `shape` returns an empty result."""
    LIBRARY.define(f"{name}({arguments}, {WEIGHT}) -> Tensor")
    for device in ("CPU", "CUDA"):
        LIBRARY.impl(name, run, device)
    torch.library.register_fake(f"attnserve::{name}", shape, lib=LIBRARY)


_register(
    "packed_multiply",
    "Tensor x",
    lambda x, *weight: _multiply(x, Panels(*weight)),
    lambda x, *weight: x.new_empty(*x.shape[:-1], Panels(*weight).outputs),
)
_register(
    "packed_gather",
    "Tensor ids, ScalarType dtype",
    lambda ids, dtype, *weight: _gather(ids, Panels(*weight), dtype),
    lambda ids, dtype, *weight: ids.new_empty(*ids.shape, Panels(*weight).inputs, dtype=dtype),
)
