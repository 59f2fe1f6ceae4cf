"""Products and lookups with packed matrices on a GPU, launched."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from quant_kernels.panels import CHUNK, PANEL, Panels
from quant_kernels.triton.product import few_kernel, gather_kernel, many_kernel

FEW = 4
"""Most rows that are multiplied without tensor cores, which take 16."""


def tile_for(rows: int, group_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Return how a product is cut up and compiled: guesses from the compiled code, nothing was
    timed.

    Args:
        rows: of x.
        group_size: inputs of a group, 16 or a multiple of 32.
        dtype: of x.

    Returns:
        What the kernels are launched with: ROWS of x, a power of two; OUTPUTS, a power of two, at
        least 16; UNIT inputs that one group has; CHUNKS of them that are multiplied at once, a
        power of two; and warps.
    """
    unit = min(group_size, CHUNK)
    if rows <= FEW:
        return {"ROWS": rows, "OUTPUTS": PANEL, "UNIT": unit, "CHUNKS": 32, "num_warps": 4}
    inputs = {"UNIT": unit, "CHUNKS": 2 if group_size % (2 * CHUNK) == 0 else 1}
    if rows <= 16:
        return {"ROWS": 16, "OUTPUTS": 32, **inputs, "num_warps": 4}
    if dtype == torch.float32:  # multiplied by plain arithmetic, from registers
        return {"ROWS": 32, "OUTPUTS": 32, **inputs, "num_warps": 4}
    if rows <= 32:
        return {"ROWS": 32, "OUTPUTS": 64, **inputs, "num_warps": 4}
    return {"ROWS": 64, "OUTPUTS": 128, **inputs, "num_warps": 8}


def multiply(x: Tensor, weight: Panels) -> Tensor:
    """Return `x @ weight.T`: `quant_kernels.multiply` for tensors on a GPU."""
    rows = x.reshape(-1, weight.inputs)
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    out = x.new_empty(*x.shape[:-1], weight.outputs)
    if not len(rows):
        return out
    tile = tile_for(len(rows), weight.group_size, x.dtype)
    kernel = few_kernel if len(rows) <= FEW else many_kernel
    kernel[(triton.cdiv(weight.outputs, tile["OUTPUTS"]), triton.cdiv(len(rows), tile["ROWS"]))](
        out, rows, *weight[:3], len(rows), weight.outputs, weight.inputs, weight.groups,
        weight.group_size, rows.stride(0),
        BITS=weight.bits, **tile, enable_fp_fusion=True, num_stages=1,
    )  # fmt: skip
    return out


def gather(ids: Tensor, weight: Panels, dtype: torch.dtype) -> Tensor:
    """Return rows of a matrix: `quant_kernels.gather` for tensors on a GPU."""
    out = torch.empty(*ids.shape, weight.inputs, dtype=dtype, device=ids.device)
    if not ids.numel():
        return out
    columns = 512
    gather_kernel[(ids.numel(), triton.cdiv(weight.inputs, columns))](
        out, ids.contiguous(), *weight[:3], weight.outputs, weight.inputs, weight.groups,
        weight.group_size,
        BITS=weight.bits, COLUMNS=columns, enable_fp_fusion=True, num_warps=4,
    )  # fmt: skip
    return out
