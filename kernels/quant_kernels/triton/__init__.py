"""Products and lookups with packed matrices on a GPU, launched."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import triton
from torch import Tensor

from quant_kernels.panels import CHUNK, PANEL, Panels
from quant_kernels.triton.product import few_kernel, gather_kernel, many_kernel

FEW = 4
"""Most rows that are multiplied without tensor cores, which take 16."""


@dataclass(frozen=True)
class ProductTile:
    """How a product is cut up and compiled. Guesses from the compiled code: nothing was timed.

    Args:
        rows: of x, a power of two.
        outputs: a power of two, at least 16.
        chunks: of 32 inputs that are multiplied at once, a power of two.
        num_warps, num_stages: Triton's.
    """

    rows: int
    outputs: int
    chunks: int
    num_warps: int
    num_stages: int = 1


def tile_for(rows: int, group_chunks: int, dtype: torch.dtype) -> ProductTile:
    """Return the tile of a product.

    Args:
        rows: of x.
        group_chunks: chunks of a group.
        dtype: of x.
    """
    if rows <= FEW:
        return ProductTile(rows, PANEL, 32, num_warps=4)
    chunks = 2 if group_chunks % 2 == 0 else 1
    if rows <= 16:
        return ProductTile(16, 32, chunks, num_warps=4)
    if dtype == torch.float32:  # multiplied by plain arithmetic, from registers
        return ProductTile(32, 32, chunks, num_warps=4)
    if rows <= 32:
        return ProductTile(32, 64, chunks, num_warps=4)
    return ProductTile(64, 128, chunks, num_warps=8)


def multiply(x: Tensor, weight: Panels) -> Tensor:
    """Return `x @ weight.T`: `quant_kernels.multiply` for tensors on a GPU."""
    rows = x.reshape(-1, weight.inputs)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.outputs)
    if not len(rows):
        return out
    group_chunks = weight.group_size // CHUNK
    tile = tile_for(len(rows), group_chunks, x.dtype)
    kernel = few_kernel if len(rows) <= FEW else many_kernel
    kernel[(triton.cdiv(weight.outputs, tile.outputs), triton.cdiv(len(rows), tile.rows))](
        out,
        rows,
        *weight[:3],
        len(rows),
        weight.outputs,
        weight.inputs,
        weight.scales.shape[1],
        group_chunks,
        rows.stride(0),
        BITS=weight.bits,
        ROWS=tile.rows,
        CHUNKS=tile.chunks,
        OUTPUTS=tile.outputs,
        enable_fp_fusion=True,
        num_warps=tile.num_warps,
        num_stages=tile.num_stages,
    )
    return out


def gather(ids: Tensor, weight: Panels, dtype: torch.dtype) -> Tensor:
    """Return rows of a matrix: `quant_kernels.gather` for tensors on a GPU."""
    out = torch.empty(*ids.shape, weight.inputs, dtype=dtype, device=ids.device)
    if not ids.numel():
        return out
    columns = 512
    gather_kernel[(ids.numel(), triton.cdiv(weight.inputs, columns))](
        out,
        ids.contiguous(),
        *weight[:3],
        weight.outputs,
        weight.inputs,
        weight.scales.shape[1],
        weight.group_size // CHUNK,
        BITS=weight.bits,
        COLUMNS=columns,
        enable_fp_fusion=True,
        num_warps=4,
    )
    return out
