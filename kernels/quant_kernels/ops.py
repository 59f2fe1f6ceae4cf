"""Products and lookups with packed matrices, as operators of torch: on a CPU C++ kernels, one
library for each number of bits, and torch operations where nothing can be built; on a GPU
`quant_kernels.triton`."""

from __future__ import annotations

import ctypes
import functools
import logging
from ctypes import c_void_p
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from attn_kernels.cpu.build import HERE as ATTENTION
from attn_kernels.cpu.build import best, chosen_isas, compile_library, open_library
from quant_kernels.panels import Panels, dequantize
from quant_kernels.weight import BITS

HERE = Path(__file__).parent
ABI = 96
"""Bytes of `ProductCall`, by which one library calls another."""

logger = logging.getLogger(__name__)

LIBRARY = torch.library.Library("attnserve", "FRAGMENT")
WEIGHT = (
    "Tensor words, Tensor scales, Tensor? zeros, int bits, int group_size, int outputs, int inputs"
)

loaded: dict[int, bool] = {}
"""By bits, whether there are kernels; of what `load` was asked for."""


def build(bits: int, isa: str) -> Path:
    """Return the library for one number of bits, built if need be (some seconds, once a machine).

    Raises:
        BuildError: it cannot be built.
    """
    return compile_library(
        HERE / "packed.cpp",
        isa,
        name=f"packed{bits}",
        define=f"WEIGHT_BITS={bits}",
        reads={HERE / "packed.cpp", *HERE.glob("*.hpp"), *ATTENTION.glob("*.hpp")},
        options=(f"-I{ATTENTION}",),
    )


def build_operators() -> Path:
    """Return the library of torch's operators, which call those of `build`.

    Raises:
        BuildError: it cannot be built.
    """
    torch_folder = Path(torch.__file__).parent
    return compile_library(
        HERE / "operators.cpp",
        "portable",
        name="packed",
        define="TORCH_TARGET_VERSION=0x020a000000000000",  # 2.10, and all later ones
        reads={HERE / "operators.cpp", HERE / "product.hpp", ATTENTION / "simd.hpp"},
        options=(
            f"-I{ATTENTION}",
            f"-I{torch_folder / 'include'}",
            f"-L{torch_folder / 'lib'}",
            "-Wl,--no-as-needed,-ltorch_cpu",
        ),
    )


def load(bits: int) -> bool:
    """Load the kernels for one number of bits and `$ATTNSERVE_CPU_ISA`, else the best instruction
    set, unless that was done before.

    Returns:
        Whether there are any; if not, one warning has said why.

    Raises:
        ValueError: there never are.
    """
    if bits not in BITS:
        raise ValueError(f"a weight of {bits} bits: {BITS[0]} to {BITS[-1]} are possible")
    if bits not in loaded:
        what = f"a weight of {bits} bits"
        library, why = best(what, chosen_isas(), functools.partial(_open, bits))
        if library is None:
            logger.warning(
                "attnserve: weights of %s bits run in torch operations, many times slower than CPU "
                "kernels: %s",
                bits,
                why,
            )
        loaded[bits] = library is not None
    return loaded[bits]


def _open(bits: int, isa: str) -> ctypes.CDLL:
    """Load the kernels for one number of bits, and let the operators call them."""
    library = open_library(build(bits, isa), "attnserve_packed_abi", ABI)
    functions = library.attnserve_packed_multiply, library.attnserve_packed_gather
    _operators().attnserve_packed_use(bits, *(ctypes.cast(f, c_void_p) for f in functions))
    return library


@functools.cache
def _operators() -> ctypes.CDLL:
    """Load the operators, which makes them torch's."""
    return open_library(build_operators(), "attnserve_packed_abi", ABI)


def _has_kernels(weight: Panels) -> bool:
    """Return whether an operator takes a weight. While torch compiles nothing can be loaded: what
    is not is multiplied by torch operations then."""
    if weight.words.is_cuda:
        return True
    return loaded.get(weight.bits, False) if torch.compiler.is_compiling() else load(weight.bits)


def multiply(x: Tensor, weight: Panels) -> Tensor:
    """Return `x @ weight.T`, summed in float32.

    Args:
        x: `[..., inputs]`, float32, bfloat16 or float16, on a CPU or a GPU.
        weight: the matrix, there too.

    Returns:
        `[..., outputs]` in x's dtype.

    Raises:
        RuntimeError: shapes or types that do not fit; no memory for scratch space.
    """
    if not _has_kernels(weight):
        return linear(x, dequantize(weight).to(x.dtype))
    product: Tensor = torch.ops.attnserve.packed_multiply(x, *weight)
    return product


def gather(ids: Tensor, weight: Panels, dtype: torch.dtype) -> Tensor:
    """Return rows of a matrix.

    Args:
        ids: integers `[...]`.
        weight: the matrix, on the same device.
        dtype: of the rows: float32, bfloat16 or float16.

    Returns:
        `[..., inputs]` in `dtype`. A row that is not there is 0, and nothing is read for it: an
        error would end a server, and a GPU can raise none without being waited for.

    Raises:
        RuntimeError: shapes or types that do not fit.
    """
    ids = ids.long()
    if not _has_kernels(weight):
        inside = (ids >= 0) & (ids < weight.outputs)
        matrix = dequantize(weight).to(dtype)
        return embedding(ids.where(inside, 0), matrix) * inside.unsqueeze(-1)
    rows: Tensor = torch.ops.attnserve.packed_gather(ids, dtype, *weight)
    return rows


def _multiply_on_gpu(x: Tensor, *weight: Any) -> Tensor:
    from quant_kernels import triton

    return triton.multiply(x, Panels(*weight))


def _gather_on_gpu(ids: Tensor, dtype: torch.dtype, *weight: Any) -> Tensor:
    from quant_kernels import triton

    return triton.gather(ids, Panels(*weight), dtype)


def _define(name: str, arguments: str, on_gpu: Any, shape: Any) -> None:
    """Define an operator, whose kernel for CPUs `operators.cpp` registers: `shape` returns an empty
    result."""
    LIBRARY.define(f"{name}({arguments}, {WEIGHT}) -> Tensor")
    LIBRARY.impl(name, on_gpu, "CUDA")
    torch.library.register_fake(f"attnserve::{name}", shape, lib=LIBRARY)


_define(
    "packed_multiply",
    "Tensor x",
    _multiply_on_gpu,
    lambda x, *weight: x.new_empty(*x.shape[:-1], Panels(*weight).outputs),
)
_define(
    "packed_gather",
    "Tensor ids, ScalarType dtype",
    _gather_on_gpu,
    lambda ids, dtype, *weight: ids.new_empty(*ids.shape, Panels(*weight).inputs, dtype=dtype),
)
