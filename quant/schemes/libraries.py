"""Schemes of other libraries, as they are: their scales, zero points and quantized values."""

from typing import Any

import torch
from torch import Tensor

from quant_kernels.weight import BlockWeight, QuantizedWeight, QuantSpec


def compressed_tensors(weight: Tensor, spec: QuantSpec) -> QuantizedWeight:
    """Quantize float32 `[rows, columns]` with compressed-tensors' round to nearest; scales are
    float32, the weight's dtype. Groups must divide the columns."""
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
    unsigned = None if spec.symmetric else (zeros.int() + spec.midpoint).to(torch.uint8)
    return _from_signed(signed, scales, unsigned, spec)


def quanto(weight: Tensor, spec: QuantSpec) -> QuantizedWeight:
    """Quantize float32 `[rows, columns]` with optimum-quanto (0.2.7): 2 and 4 bits by groups that
    divide the columns, 8 bits by rows.

    Scales and zero points are float32; they are those of the optimizers that
    `optimum.quanto.quantize` takes by default.
    """
    from optimum.quanto import AbsmaxOptimizer, MaxOptimizer, qint2, qint4, qint8

    rows, columns = weight.shape
    if spec.bits == 8:
        scale = AbsmaxOptimizer()(weight, qint8, axis=0)
        signed = torch.ops.quanto.quantize_symmetric(weight, torch.int8, 0, scale)
        return _from_signed(signed, scale, None, spec)
    size, kind = spec.size(columns), {2: qint2, 4: qint4}[spec.bits]
    scale, shift = MaxOptimizer()(weight, kind, axis=0, group_size=size)
    quantized = torch.ops.quanto.quantize_affine(weight, spec.bits, 0, size, scale, shift)
    # A group of equal numbers has a scale of 0, which the library divides by.
    zeros = torch.where(scale == 0, 0, shift / scale)
    return QuantizedWeight(
        quantized.view(rows, columns), scale.view(rows, -1), zeros.view(rows, -1), spec
    )


def hqq(weight: Tensor, spec: QuantSpec) -> BlockWeight:
    """Quantize float32 `[rows, columns]` with HQQ by its authors (0.2.8): groups along the
    flattened rows (`axis=1`), which must divide the matrix; scales and zero points are float16, as
    in `HQQLinear`."""
    # The module, which transformers may have imported already.
    from hqq.core.quantize import Quantizer

    quantized: Tensor
    meta: dict[str, Any]
    quantized, meta = Quantizer.quantize(
        weight, spec.bits, group_size=spec.group_size, axis=1, bitpack=False, device="cpu"
    )
    scales, zeros = (meta[name].half().flatten() for name in ("scale", "zero"))
    return BlockWeight(quantized.to(torch.uint8).view(weight.shape), scales, zeros, spec)


def nf4(weight: Tensor, spec: QuantSpec) -> BlockWeight:
    """Quantize float32 `[rows, columns]` to bitsandbytes' 4-bit NormalFloat (QLoRA, arXiv
    2305.14314)."""
    return _bitsandbytes(weight, spec, "nf4")


def fp4(weight: Tensor, spec: QuantSpec) -> BlockWeight:
    """Quantize float32 `[rows, columns]` to bitsandbytes' 4-bit floating point."""
    return _bitsandbytes(weight, spec, "fp4")


def _bitsandbytes(weight: Tensor, spec: QuantSpec, kind: str) -> BlockWeight:
    """Quantize to the values of a table, with a float32 scale a block (no nested quantization).

    The library's own `dequantize_4bit` for CPUs (0.50) assumes that blocks begin with each row, and
    is wrong where they do not divide the columns; `BlockWeight.dequantize` is right.
    """
    from bitsandbytes.functional import quantize_4bit

    assert spec.group_size is not None
    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=spec.group_size, compress_statistics=False, quant_type=kind
    )
    both = packed.flatten()
    quantized = torch.stack((both >> 4, both & 15), dim=1).flatten()[: weight.numel()]
    return BlockWeight(quantized.view(weight.shape), state.absmax, None, spec, state.code.float())


def int8(weight: Tensor, spec: QuantSpec) -> QuantizedWeight:
    """Quantize float32 `[rows, columns]` to signed bytes with a float32 scale a row: the weights of
    bitsandbytes' "LLM.int8()". On a CPU it has no int8 product and no column of outliers."""
    from bitsandbytes.functional import int8_vectorwise_quant

    signed, largest, _ = int8_vectorwise_quant(weight)
    return _from_signed(signed, largest[:, None] / 127, None, spec)


def _from_signed(
    signed: Tensor, scales: Tensor, zeros: Tensor | None, spec: QuantSpec
) -> QuantizedWeight:
    """Return a weight from quantized values that lie around 0."""
    return QuantizedWeight((signed.int() + spec.midpoint).to(torch.uint8), scales, zeros, spec)
