"""HQQ by its authors' library (hqq 0.2.8): groups along the flattened rows (`axis=1`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from quant_kernels.weight import BlockWeight, QuantSpec

BITS = (2, 3, 4, 5, 6, 8)


def hqq_library(weight: Tensor, spec: QuantSpec) -> BlockWeight:
    """Quantize float32 `[rows, columns]`; scales and zero points are float16, as in `HQQLinear`.

    Args:
        weight: the matrix.
        spec: not symmetric; its groups must divide the numbers of the matrix.
    """
    # The module, which transformers may have imported already.
    from hqq.core.quantize import Quantizer

    codes: Tensor
    meta: dict[str, Any]
    codes, meta = Quantizer.quantize(
        weight, spec.bits, group_size=spec.group_size, axis=1, bitpack=False, device="cpu"
    )
    scales, zeros = (meta[name].half().flatten() for name in ("scale", "zero"))
    return BlockWeight(codes.to(torch.uint8).view(weight.shape), scales, zeros, spec)
