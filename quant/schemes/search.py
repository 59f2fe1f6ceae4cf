"""Scales and zero points by the error that they leave, rather than by a group's extremes.

With few bits, a range that cuts off the extremes costs less than the larger steps of one that
reaches them. So narrower ranges are tried and the one with the least weighted squared error is
kept, the whole range included: it is never worse in that error.
"""

import torch
from torch import Tensor

from quant_kernels.weight import QuantSpec, bfloat16_above

SHRINKS = [1 - 0.05 * step for step in range(11)]  # of the whole range: 1 to 0.5


def search_qparams(
    weight: Tensor, importance: Tensor, spec: QuantSpec
) -> tuple[Tensor, Tensor | None]:
    """Return scales and zero points, as `QuantSpec.qparams` does.

    Args:
        weight: float32 `[rows, columns]`.
        importance: float32 `[columns]`: what a squared error in a column costs.
        spec: bits, group size and symmetry.
    """
    values, cost = spec.grouped(weight), spec.grouped(importance[None])
    widest, centre = spec.qparams(weight)
    scales, zeros = widest.clone(), None if centre is None else centre.clone()
    least = torch.full(widest.shape, torch.inf)
    for shrink in SHRINKS:
        scale = bfloat16_above(widest.float() * shrink)
        steps = values / scale.float()[..., None]
        for shift in (0, -1, 1) if centre is not None else (0,):
            zero = torch.full_like(least, spec.midpoint)
            if centre is not None:
                zero = (centre.float() + shift).clamp(0, spec.qmax)
            moved = steps + zero[..., None]
            error = ((moved - spec.rounded(moved)).square() * cost).sum(-1) * scale.float().square()
            better = error < least
            least = torch.where(better, error, least)
            scales = torch.where(better, scale, scales)
            if zeros is not None:
                zeros = torch.where(better, zero.to(torch.uint8), zeros)
    return scales, zeros
