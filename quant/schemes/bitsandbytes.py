"""bitsandbytes' own codes (0.50): NF4 and FP4 by blocks, and the weights of "LLM.int8()".

On a CPU all three quantize weights only: there is no int8 product and no column of outliers.

The codes and scales are the library's, their product is ours: its `dequantize_4bit` for CPUs takes
blocks to begin with each row, and is wrong where they do not divide the columns.
"""

from __future__ import annotations

import torch
from torch import Tensor

from quant_kernels.weight import BlockWeight, QuantizedWeight, QuantSpec

BLOCKS = tuple(2**power for power in range(5, 13))


def nf4(weight: Tensor, spec: QuantSpec) -> BlockWeight:
    """Quantize float32 `[rows, columns]` to 4-bit NormalFloat (QLoRA, arXiv 2305.14314)."""
    return four_bits(weight, spec, "nf4")


def fp4(weight: Tensor, spec: QuantSpec) -> BlockWeight:
    """Quantize float32 `[rows, columns]` to 4-bit floating point."""
    return four_bits(weight, spec, "fp4")


def four_bits(weight: Tensor, spec: QuantSpec, kind: str) -> BlockWeight:
    """Codes of the library's table, and a float32 scale a block (no nested quantization)."""
    from bitsandbytes.functional import quantize_4bit

    assert spec.group_size is not None
    packed, state = quantize_4bit(
        weight.contiguous(), blocksize=spec.group_size, compress_statistics=False, quant_type=kind
    )
    both = packed.flatten()
    codes = torch.stack((both >> 4, both & 15), dim=1).flatten()[: weight.numel()]
    return BlockWeight(codes.view(weight.shape), state.absmax, None, spec, state.code.float())


def int8(weight: Tensor, spec: QuantSpec) -> QuantizedWeight:
    """Quantize float32 `[rows, columns]` to signed bytes with a float32 scale a row."""
    from bitsandbytes.functional import int8_vectorwise_quant

    signed, largest, _ = int8_vectorwise_quant(weight)
    codes = (signed.int() + spec.midpoint).to(torch.uint8)
    return QuantizedWeight(codes, largest[:, None] / 127, None, spec)


def wants_blocks(spec: QuantSpec) -> str | None:
    """Why it cannot do a spec of 4 bits, and what to do."""
    if spec.group_size not in BLOCKS:
        return f"has blocks of {', '.join(map(str, BLOCKS))}: use one of them for --groups"
    if spec.symmetric:
        return "has a table of its own, with 0 in it: leave out --symmetric"
    return None


def wants_rows(spec: QuantSpec) -> str | None:
    """Why it cannot do a spec of 8 bits, and what to do."""
    if spec.group_size is not None or not spec.symmetric:
        return "has a scale a row and no zero points: use --groups channel --symmetric"
    return None
