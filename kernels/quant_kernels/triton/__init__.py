"""Products and lookups with packed matrices on a GPU, launched."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from attn_kernels.triton.launch import launch
from attn_kernels.triton.layer import device_figures
from quant_kernels.panels import CHUNK, PANEL, Panels
from quant_kernels.triton.product import (
    add_kernel,
    few_kernel,
    gather_kernel,
    many_kernel,
    unpack_kernel,
)

FEW = 4
"""Most rows of float32, which tensor cores do not multiply, that are multiplied where a weight was
unpacked."""

UNPACKED_ROWS = 256
"""From so many rows on the matrix is unpacked for torch's product: each tile of rows would unpack
it again."""

UNPACKED_SIZE = 2**26
"""Most weights that are unpacked at a time, 128 MiB in 16 bits: a vocabulary's matrix is larger."""


def tile_for(rows: int, weight: Panels, dtype: torch.dtype, arch: str) -> dict[str, int]:
    """Return how a product is cut up and compiled: what has the fewest instructions a weight and
    spills no register where it is compiled (benchmarks.triton_compile --packed); nothing was timed.

    Args:
        rows: of x.
        weight: the matrix.
        dtype: of x.
        arch: "sm_90", "gfx942".

    Returns:
        What the kernels are launched with: ROWS of x and OUTPUTS, powers of two; CHUNKS that are
        multiplied at once, a power of two; warps and stages.
    """
    if dtype == torch.float32 and rows <= FEW:
        return {"ROWS": rows, "OUTPUTS": PANEL, "CHUNKS": 32, "num_warps": 4, "num_stages": 1}
    of_group = max(1, weight.group_size // CHUNK) if weight.groups > 1 else 4
    chunks = next(count for count in (4, 2, 1) if of_group % count == 0)
    if dtype == torch.float32:  # multiplied by plain arithmetic, from registers
        tile = {"ROWS": 16 if rows <= 16 else 32, "OUTPUTS": 32, "CHUNKS": min(chunks, 2)}
        return tile | {"num_warps": 4, "num_stages": 1}
    # A thread has two outputs' chunks at least: of one, Triton stores each weight by itself.
    num_warps = 4
    if rows <= 16 or _group(weight) == 16:
        tile = {"ROWS": 16, "OUTPUTS": 128 if chunks == 4 else 256}
    elif rows <= 32 or chunks == 1:
        tile = {"ROWS": 32, "OUTPUTS": 256 if chunks == 1 else 128}
    else:
        tile = {"ROWS": 64, "OUTPUTS": 128}
        num_warps = 8 if chunks == 4 else 4
    stages = 1 if arch.startswith("gfx") else 3
    return tile | {"CHUNKS": chunks, "num_warps": num_warps, "num_stages": stages}


def multiply(x: Tensor, weight: Panels, arch: str | None = None) -> Tensor:
    """Return `x @ weight.T`: `quant_kernels.multiply` for tensors on a GPU.

    Nothing waits for the device, and what is launched depends on shapes only: CUDA graphs hold it.

    Args:
        x: `[..., inputs]`.
        weight: the matrix.
        arch: "sm_90", "gfx942"; the device's if None.
    """
    rows = x.reshape(-1, weight.inputs)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.outputs)
    if len(rows) >= UNPACKED_ROWS:
        _multiply_unpacked(rows, weight, out.view(-1, weight.outputs))
    elif len(rows):
        _multiply_packed(rows, weight, out, arch)
    return out


def _multiply_packed(x: Tensor, weight: Panels, out: Tensor, arch: str | None) -> None:
    """Multiply weights where they are unpacked. Where that is fewer than two programs a
    multiprocessor, the inputs are cut into parts, whose sums are added up afterwards."""
    found, num_multiprocessors = device_figures(x.device)
    tile = tile_for(len(x), weight, x.dtype, arch or found)
    grid = triton.cdiv(weight.outputs, tile["OUTPUTS"]), triton.cdiv(len(x), tile["ROWS"])
    steps = triton.cdiv(weight.inputs, CHUNK * tile["CHUNKS"])
    steps_each = max(1, steps // triton.cdiv(2 * num_multiprocessors, grid[0] * grid[1]))
    parts = triton.cdiv(steps, steps_each)
    # Of torch's allocator, and not kept: a graph that is captured holds what it needs.
    sums = out if parts == 1 else out.new_empty(parts, *out.shape, dtype=torch.float32)
    kernel = few_kernel if tile["ROWS"] <= FEW else many_kernel
    launch(
        kernel, (*grid, parts),
        sums, x, *weight[:3], len(x), weight.outputs, weight.inputs, weight.groups,
        steps_each * tile["CHUNKS"], x.stride(0),
        BITS=weight.bits, GROUP=_group(weight), **tile, enable_fp_fusion=True,
    )  # fmt: skip
    if parts > 1:
        block = 1024
        launch(
            add_kernel, (triton.cdiv(out.numel(), block),),
            out, sums, out.numel(), parts, BLOCK=block, enable_fp_fusion=True, num_warps=4,
        )  # fmt: skip


def _multiply_unpacked(x: Tensor, weight: Panels, out: Tensor) -> None:
    """Multiply by torch's product of pieces of the matrix, each unpacked to x's dtype."""
    for first, outputs in _pieces(weight):
        matrix = unpack(weight, x.dtype, first, outputs)
        torch.mm(x, matrix.T, out=out[:, first : first + outputs])


def _pieces(weight: Panels) -> list[tuple[int, int]]:
    """Return the first output and the outputs of each piece that is unpacked at a time."""
    size = max(PANEL, UNPACKED_SIZE // weight.inputs // PANEL * PANEL)
    starts = range(0, weight.outputs, size)
    return [(first, min(size, weight.outputs - first)) for first in starts]


def compile_launches(weight: Panels, dtype: torch.dtype, max_rows: int) -> None:
    """Launch what products and lookups of any size do; inside `launch.compile_only` that compiles
    it.

    Args:
        weight: the matrix.
        dtype: of x.
        max_rows: of x.
    """
    most = min(max_rows, UNPACKED_ROWS - 1)
    # Of a tile the fewest and the most rows: whether there are parts depends on them.
    for rows in sorted({min(rows, most) for rows in (*range(1, FEW + 2), 16, 17, 32, 33, most)}):
        x = weight.words.new_empty(rows, weight.inputs, dtype=dtype)
        _multiply_packed(x, weight, x.new_empty(rows, weight.outputs), None)
    if max_rows >= UNPACKED_ROWS:
        for outputs in {outputs for _, outputs in _pieces(weight)}:
            unpack(weight, dtype, 0, outputs)
    gather(weight.words.new_zeros(1, dtype=torch.int64), weight, dtype)


def unpack(weight: Panels, dtype: torch.dtype, first: int, outputs: int) -> Tensor:
    """Return rows of a matrix on a GPU, `[outputs, inputs]`.

    Args:
        weight: the matrix.
        dtype: of the rows: float32, bfloat16 or float16.
        first: the first one, a multiple of 16.
        outputs: how many.
    """
    out = weight.words.new_empty(outputs, weight.inputs, dtype=dtype)
    tile = {"OUTPUTS": 32, "CHUNKS": 4}
    grid = triton.cdiv(outputs, tile["OUTPUTS"]), triton.cdiv(weight.inputs, CHUNK * tile["CHUNKS"])
    launch(
        unpack_kernel, grid,
        out, *weight[:3], first, outputs, weight.inputs, weight.groups,
        BITS=weight.bits, GROUP=_group(weight), **tile, enable_fp_fusion=True, num_warps=4,
    )  # fmt: skip
    return out


def gather(ids: Tensor, weight: Panels, dtype: torch.dtype) -> Tensor:
    """Return rows of a matrix: `quant_kernels.gather` for tensors on a GPU."""
    out = torch.empty(*ids.shape, weight.inputs, dtype=dtype, device=ids.device)
    if not ids.numel():
        return out
    chunks = min(64, triton.next_power_of_2(triton.cdiv(weight.inputs, CHUNK)))
    launch(
        gather_kernel, (ids.numel(), triton.cdiv(weight.inputs, CHUNK * chunks)),
        out, ids.contiguous(), *weight[:3], weight.outputs, weight.inputs, weight.groups,
        BITS=weight.bits, GROUP=_group(weight), CHUNKS=chunks, enable_fp_fusion=True, num_warps=2,
    )  # fmt: skip
    return out


def _group(weight: Panels) -> int:
    """Return the inputs of a group, 0 for all: compiled in, and whole rows are the same for all."""
    return weight.group_size if weight.groups > 1 else 0
