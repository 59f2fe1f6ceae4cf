"""optimum-quanto's own quantization of weights (0.2.7): 2 and 4 bits by groups, 8 bits by rows."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_kernels.weight import QuantizedWeight, QuantSpec

BITS = (2, 4, 8)


def quanto(weight: Tensor, spec: QuantSpec) -> QuantizedWeight:
    """Quantize float32 `[rows, columns]`; scales and zero points are float32, the weight's dtype.

    Scales and shifts are those of the optimizers that `optimum.quanto.quantize` takes by default.

    Args:
        weight: the matrix.
        spec: what `wants` accepts; its groups must divide the columns.
    """
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint2, qint4, qint8

    rows, columns = weight.shape
    if spec.bits == 8:
        scale = AbsmaxOptimizer()(weight, qint8, axis=0)
        signed = torch.ops.quanto.quantize_symmetric(weight, torch.int8, 0, scale)
        return QuantizedWeight((signed.int() + spec.midpoint).to(torch.uint8), scale, None, spec)
    size, kind = spec.size(columns), {2: qint2, 4: qint4}[spec.bits]
    scale, shift = MaxOptimizer()(weight, kind, axis=0, group_size=size)
    codes = torch.ops.quanto.quantize_affine(weight, spec.bits, 0, size, scale, shift)
    # A group of equal numbers has a scale of 0, which the library divides by.
    zeros = torch.where(scale == 0, 0, shift / scale)
    return QuantizedWeight(
        codes.view(rows, columns), scale.view(rows, -1), zeros.view(rows, -1), spec
    )


def wants(spec: QuantSpec) -> str | None:
    """Why it cannot do a spec of its widths, and what to do."""
    if spec.bits == 8 and not (spec.symmetric and spec.group_size is None):
        return "has 8 bits with a scale a row and no zero points: use --groups channel --symmetric"
    if spec.bits < 8 and spec.symmetric:
        return "has 2 and 4 bits with zero points only: leave out --symmetric"
    return None
