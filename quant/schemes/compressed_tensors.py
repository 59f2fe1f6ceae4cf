"""compressed-tensors' own round-to-nearest: scales, zero points and codes are the library's."""

from __future__ import annotations

import torch
from torch import Tensor

from quant_kernels.weight import QuantizedWeight, QuantSpec


def compressed_tensors(weight: Tensor, spec: QuantSpec) -> QuantizedWeight:
    """Quantize float32 `[rows, columns]`; scales are float32, the weight's dtype.

    Args:
        weight: the matrix.
        spec: its groups must divide the columns.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationStrategy
    from compressed_tensors.quantization.lifecycle.forward import quantize
    from compressed_tensors.quantization.utils import calculate_qparams

    channel = spec.group_size is None
    args = QuantizationArgs(
        num_bits=spec.bits,
        symmetric=spec.symmetric,
        strategy=QuantizationStrategy.CHANNEL if channel else QuantizationStrategy.GROUP,
        group_size=spec.group_size,
    )
    values = spec.grouped(weight)
    scales, zeros = calculate_qparams(values.amin(-1), values.amax(-1), args)
    signed = quantize(weight, scales, zeros, args, dtype=torch.int8)
    return QuantizedWeight(
        (signed.int() + spec.midpoint).to(torch.uint8),
        scales,
        None if spec.symmetric else (zeros.int() + spec.midpoint).to(torch.uint8),
        spec,
    )
