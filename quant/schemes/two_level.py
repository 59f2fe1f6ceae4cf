"""GPTQ with small groups and two-level scales (`quant_kernels.levels`).

As in GPTQ, each column's error is made up for by the columns to come, and a group's scale and zero
point are fitted when its turn comes. Since only 256 of them are possible, all are tried, and the
pair with the least squared error is taken, each column weighted by what its error costs:
`1 / U_jj^2`, with U as in `gptq`.

What GPTQ leaves is improved by coordinate descent (as QuantEase does, arXiv 2309.01885), with
nothing but the error of the layer's outputs: each value in turn takes the best one while all others
stay, then each group takes the best of its 256 pairs while its values stay.
"""

import torch
from torch import Tensor

from quant.schemes.gptq import damped, inverse_factor, with_feedback, without_dead_columns
from quant.schemes.search import search_qparams
from quant_kernels.levels import LEVELS, scales_of, zeros_of
from quant_kernels.weight import QuantSpec, TwoLevelWeight, bfloat16_above

SWEEPS = 3  # of coordinate descent
HEADROOM = 1.1  # of a row's scale, for groups that grow as they make up for errors


def two_level(weight: Tensor, spec: QuantSpec, hessian: Tensor) -> TwoLevelWeight:
    """Quantize float32 `[rows, columns]`.

    Args:
        weight: the matrix.
        spec: bits and group size; it is not symmetric.
        hessian: float32 `[columns, columns]`, `X X^T` of the layer's inputs in any unit.
    """
    rows, columns = weight.shape
    left = without_dead_columns(weight, hessian)
    upper = inverse_factor(hessian)
    importance = upper.diagonal() ** -2
    searched, _ = search_qparams(left, importance, spec)
    used = searched.float() * spec.grouped(left).any(-1)  # a group of zeros has a scale of 1
    row_scales = bfloat16_above(HEADROOM * used.amax(1, keepdim=True))
    levels = torch.zeros(rows, spec.groups(columns), dtype=torch.uint8)

    def fit(group: int, begin: int, now: Tensor) -> None:
        cost = importance[begin : begin + now.shape[1]]
        levels[:, group] = best_levels(now, cost, row_scales, spec)

    def qparams(group: int) -> tuple[Tensor, Tensor]:
        own = levels[:, group]
        return scales_of(own, row_scales[:, 0]), zeros_of(own, spec.bits)

    values = with_feedback(left, spec, upper, torch.arange(columns), qparams, fit)
    found = TwoLevelWeight(values, row_scales, None, spec, levels=levels)
    improve(left, found, damped(hessian).float())
    return found


def improve(weight: Tensor, quantized: TwoLevelWeight, hessian: Tensor) -> None:
    """Lower `tr(E H E^T)` of the error E by coordinate descent, in place.

    Args:
        weight: float32 `[rows, columns]`.
        quantized: its values and levels are changed.
        hessian: float32 `[columns, columns]`.
    """
    spec, columns = quantized.spec, weight.shape[1]
    size = spec.size(columns)
    slope = (quantized.dequantize() - weight) @ hessian  # half the gradient
    for _ in range(SWEEPS):
        for group, begin in enumerate(range(0, columns, size)):
            inside = slice(begin, min(begin + size, columns))
            own, values = hessian[inside, inside], quantized.values[:, inside]
            level = quantized.levels[:, group]
            scales, zeros = scales_of(level, quantized.scales[:, 0]), zeros_of(level, spec.bits)
            before = spec.dequantize(values, scales[:, None], zeros[:, None])
            now, local = before.clone(), slope[:, inside].clone()
            for j in range(now.shape[1]):
                best = now[:, j] - local[:, j] / own[j, j]
                values[:, j] = spec.quantize(best, scales, zeros)
                step = spec.dequantize(values[:, j], scales, zeros) - now[:, j]
                now[:, j] += step
                local += torch.outer(step, own[j])
            level[:] = refitted(values, local - now @ own, own, quantized.scales, spec)
            scales, zeros = scales_of(level, quantized.scales[:, 0]), zeros_of(level, spec.bits)
            change = spec.dequantize(values, scales[:, None], zeros[:, None]) - before
            slope += change @ hessian[inside]


def refitted(
    values: Tensor, linear: Tensor, hessian: Tensor, row_scales: Tensor, spec: QuantSpec
) -> Tensor:
    """Return the byte of each row of one group, uint8 `[rows]`, with which its dequantized values w
    have the least `w H w^T + 2 linear w`.

    Args:
        values: uint8 `[rows, columns of the group]`.
        linear: float32 of the same shape.
        hessian: float32, of the columns of the group.
        row_scales: bfloat16 `[rows, 1]`.
        spec: the bits.
    """
    every = torch.arange(LEVELS, dtype=torch.uint8)
    scales = scales_of(every, row_scales)  # [rows, 16]
    best = torch.zeros(len(values), dtype=torch.uint8)
    least = torch.full((len(values),), torch.inf)
    for place in range(LEVELS):
        steps = values.float() - zeros_of(every[place] << 4, spec.bits)
        square, cross = (steps @ hessian * steps).sum(1), (steps * linear).sum(1)
        cost, scale = (scales.square() * square[:, None] + 2 * scales * cross[:, None]).min(1)
        best = torch.where(cost < least, (scale + LEVELS * place).to(torch.uint8), best)
        least = torch.minimum(cost, least)
    return best


def best_levels(weight: Tensor, importance: Tensor, row_scales: Tensor, spec: QuantSpec) -> Tensor:
    """Return the byte of each row of one group, uint8 `[rows]`: that with the least error.

    Args:
        weight: float32 `[rows, columns of the group]`.
        importance: float32 `[columns of the group]`.
        row_scales: bfloat16 `[rows, 1]`.
        spec: the bits.
    """
    every = torch.arange(LEVELS, dtype=torch.uint8)
    scales = scales_of(every, row_scales)  # [rows, 16]
    steps = weight[:, None] / scales[..., None]
    best = torch.zeros(len(weight), dtype=torch.uint8)
    least = torch.full((len(weight),), torch.inf)
    for place in range(LEVELS):
        moved = steps + zeros_of(every[place] << 4, spec.bits)
        error = (moved - spec.rounded(moved)).square() @ importance * scales.square()
        error, level = error.min(1)
        byte = (level + LEVELS * place).to(torch.uint8)
        best = torch.where(error < least, byte, best)
        least = torch.minimum(error, least)
    return best
