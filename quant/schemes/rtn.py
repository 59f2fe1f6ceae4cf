"""Round to nearest: each weight takes the closest code of a grid between its group's extremes."""

from __future__ import annotations

from torch import Tensor

from quant_kernels.weight import Grid, QuantizedWeight


def rtn(weight: Tensor, grid: Grid) -> QuantizedWeight:
    """Quantize float32 `[rows, columns]`."""
    scales, zeros = grid.fit(weight)
    columns = weight.shape[1]
    codes = grid.encode(
        weight,
        grid.spread(scales, columns),
        None if zeros is None else grid.spread(zeros, columns),
    )
    return QuantizedWeight(codes, scales, zeros, grid)
