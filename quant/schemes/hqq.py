"""HQQ, half-quadratic quantization (Badri and Shaji, mobiusml.github.io/hqq_blog, 2023).

Without data, the zero points are chosen so that few weights err, rather than that none errs much:
minimise `sum |w - (q - z) s| ** p` with p < 1. Half-quadratic splitting alternates between the
proximal step of the p-norm, `e = shrink(w - w_r)` with
`shrink(x) = sign(x) relu(|x| - |x| ** (p - 1) / beta)`, and the zero points' closed form,
`z = mean(q - (w - e) / s)`, while beta grows by kappa.

Errors are in steps here, so that the result does not depend on the weights' unit.
"""

import torch
from torch import Tensor

from quant.schemes.rtn import rtn
from quant_kernels.weight import QuantizedWeight, QuantSpec

P, BETA, KAPPA, ITERATIONS = 0.7, 10.0, 1.01, 20


def hqq(weight: Tensor, spec: QuantSpec) -> QuantizedWeight:
    """Quantize float32 `[rows, columns]`; the spec is not symmetric.

    Each group keeps the best zero point that it has met, that of round-to-nearest included, so
    it is never worse in its objective.
    """
    start = rtn(weight, spec)
    assert start.zeros is not None
    values = spec.grouped(weight) / start.scales.float()[..., None]
    inside = spec.grouped(torch.ones_like(weight))
    count = inside.sum(-1)
    zeros = start.zeros.float()
    best, lowest = zeros, torch.full_like(zeros, torch.inf)
    beta = BETA
    for _ in range(ITERATIONS + 1):
        quantized = spec.rounded(values + zeros[..., None])
        error = (values - quantized + zeros[..., None]) * inside
        cost = error.abs().pow(P).sum(-1)
        best, lowest = torch.where(cost < lowest, zeros, best), torch.minimum(cost, lowest)
        size = error.abs()
        shrunk = error.sign() * (size - size.clamp(min=1e-8).pow(P - 1) / beta).relu()
        zeros = ((quantized - values + shrunk) * inside).sum(-1) / count
        zeros = zeros.half().float()  # as they are stored
        beta *= KAPPA
    columns = weight.shape[1]
    quantized = spec.quantize(
        weight, spec.expand(start.scales, columns), spec.expand(best, columns)
    )
    return QuantizedWeight(quantized, start.scales, best.half(), spec)
