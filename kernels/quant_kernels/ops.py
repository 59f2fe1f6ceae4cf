"""Products and lookups with packed matrices, as functions of tensors that torch can compile."""

from __future__ import annotations

from ctypes import byref

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear

from quant_kernels.library import FORMATS, Call, load
from quant_kernels.panels import Panels, dequantize

# Compiled graphs hold these as operators; otherwise the functions are called directly, which is
# some microseconds less.
LIBRARY = torch.library.Library("attnserve", "FRAGMENT")
WEIGHT = "Tensor words, Tensor scales, Tensor? zeros, int bits, int group"
LIBRARY.define(f"packed_multiply(Tensor x, {WEIGHT}, int outputs) -> Tensor")
LIBRARY.define(
    f"packed_gather(Tensor ids, {WEIGHT}, int outputs, int inputs, ScalarType dtype) -> Tensor"
)


def multiply(x: Tensor, weight: Panels, bits: int, group: int, outputs: int) -> Tensor:
    """`x @ weight.T`, summed in float32.

    Args:
        x: `[..., inputs]`, float32, bfloat16 or float16, on a CPU or a GPU.
        weight: the matrix, there too.
        bits: of a code.
        group: inputs that share a scale: a multiple of 32, or at least all of them.
        outputs: rows of the matrix.

    Returns:
        `[..., outputs]` in x's dtype.

    Raises:
        MemoryError: no memory for scratch space.
    """
    if torch.compiler.is_compiling():
        product: Tensor = torch.ops.attnserve.packed_multiply(x, *weight, bits, group, outputs)
        return product
    return _multiply(x, *weight, bits, group, outputs)


def gather(
    ids: Tensor,
    weight: Panels,
    bits: int,
    group: int,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
) -> Tensor:
    """Rows of a matrix.

    Args:
        ids: int64 `[...]`.
        weight, bits, group, outputs: as `multiply` takes them.
        inputs: columns of the matrix.
        dtype: float32, bfloat16 or float16.

    Returns:
        `[..., inputs]` in `dtype`. A row that is not there is 0, and nothing is read for it: an
        error would end a server, and a GPU can raise none without being waited for.
    """
    shape = (outputs, inputs)
    if torch.compiler.is_compiling():
        rows: Tensor = torch.ops.attnserve.packed_gather(ids, *weight, bits, group, *shape, dtype)
        return rows
    return _gather(ids, *weight, bits, group, *shape, dtype)


def call_of(
    weight: Panels,
    given: Tensor,
    out: Tensor,
    shape: tuple[int, int],
    group: int,
    stride: int,
    count: int,
) -> Call:
    """What the C++ kernels take.

    Args:
        weight: the matrix.
        given: `count` rows, `stride` elements apart, or `count` row numbers.
        out: where the result goes.
        shape: `(outputs, inputs)` of the matrix.
        group: inputs that share a scale.
        stride, count: of `given`.
    """
    words, scales, zeros = weight
    return Call(
        words.data_ptr(),
        scales.data_ptr(),
        None if zeros is None else zeros.data_ptr(),
        given.data_ptr(),
        out.data_ptr(),
        *shape,
        group,
        stride,
        count,
        FORMATS[scales.dtype],
        FORMATS[None if zeros is None else zeros.dtype],
        FORMATS[out.dtype],
        torch.get_num_threads(),
    )


def _multiply(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    outputs: int,
) -> Tensor:
    if x.is_cuda:
        from quant_kernels import triton

        return triton.multiply(x, Panels(words, scales, zeros), bits, group, outputs)
    inputs = x.shape[-1]
    library = load(bits)
    if library is None:
        matrix = dequantize(Panels(words, scales, zeros), outputs, inputs, bits, group)
        return linear(x, matrix.to(x.dtype))
    rows = x.reshape(-1, inputs)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = x.new_empty(*x.shape[:-1], outputs)
    weight = Panels(words, scales, zeros)
    call = call_of(weight, rows, out, (outputs, inputs), group, rows.stride(0), len(rows))
    if library.attnserve_packed_multiply(byref(call)):
        raise MemoryError("no memory for the scratch space of a product with packed weights")
    return out


def _gather(
    ids: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
) -> Tensor:
    if ids.is_cuda:
        from quant_kernels import triton

        return triton.gather(ids, Panels(words, scales, zeros), bits, group, outputs, inputs, dtype)
    library = load(bits)
    weight = Panels(words, scales, zeros)
    if library is None:
        inside = (ids >= 0) & (ids < outputs)
        matrix = dequantize(weight, outputs, inputs, bits, group)
        return embedding(ids.where(inside, 0), matrix.to(dtype)) * inside.unsqueeze(-1)
    ids = ids.contiguous()
    out = torch.empty(*ids.shape, inputs, dtype=dtype)
    call = call_of(weight, ids, out, (outputs, inputs), group, 0, ids.numel())
    if library.attnserve_packed_gather(byref(call)):  # it has read nothing: an id is out of range
        inside = (ids >= 0) & (ids < outputs)
        safe = ids.where(inside, 0)
        found = _gather(safe, words, scales, zeros, bits, group, outputs, inputs, dtype)
        return found.masked_fill_(~inside.unsqueeze(-1), 0)
    return out


for _device in ("CPU", "CUDA"):
    LIBRARY.impl("packed_multiply", _multiply, _device)
    LIBRARY.impl("packed_gather", _gather, _device)


@torch.library.register_fake("attnserve::packed_multiply", lib=LIBRARY)
def _multiply_shape(
    x: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    outputs: int,
) -> Tensor:
    return x.new_empty(*x.shape[:-1], outputs)


@torch.library.register_fake("attnserve::packed_gather", lib=LIBRARY)
def _gather_shape(
    ids: Tensor,
    words: Tensor,
    scales: Tensor,
    zeros: Tensor | None,
    bits: int,
    group: int,
    outputs: int,
    inputs: int,
    dtype: torch.dtype,
) -> Tensor:
    return ids.new_empty(*ids.shape, inputs, dtype=dtype)
