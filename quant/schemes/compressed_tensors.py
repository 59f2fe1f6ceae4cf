"""compressed-tensors' own round-to-nearest: scales, zero points and codes are the library's."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_kernels.weight import Grid, QuantizedWeight


def compressed_tensors(weight: Tensor, grid: Grid) -> QuantizedWeight:
    """Quantize float32 `[rows, columns]`; scales are float32, the weight's dtype.

    Args:
        weight: the matrix.
        grid: its groups must divide the columns.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    channel = grid.group_size is None
    args = QuantizationArgs(
        num_bits=grid.bits,
        symmetric=grid.symmetric,
        strategy=QuantizationStrategy.CHANNEL if channel else QuantizationStrategy.GROUP,
        group_size=grid.group_size,
    )
    values = grid.grouped(weight)
    scales, zeros = calculate_qparams(values.amin(-1), values.amax(-1), args)
    signed = quantize(weight, scales, zeros, args, dtype=torch.int8)
    return QuantizedWeight(
        (signed.int() + grid.middle).to(torch.uint8),
        scales,
        None if grid.symmetric else (zeros.int() + grid.middle).to(torch.uint8),
        grid,
    )
