"""GPTQ with small groups and two-level scales (`quant_kernels.levels`).

As in GPTQ, each column's error is made up for by the columns to come, and a group's scale and zero
point are fitted when its turn comes. Since only 256 of them are possible, all are tried, and the
pair with the least squared error is taken, each column weighted by what its error costs:
`1 / U_jj^2`, with U as in `gptq`.
"""

import torch
from torch import Tensor

from quant.schemes.gptq import inverse_factor, with_feedback, without_dead_columns
from quant.schemes.search import search_qparams
from quant_kernels.levels import LEVELS, scales_of, zeros_of
from quant_kernels.weight import QuantSpec, TwoLevelWeight, bfloat16_above

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
    return TwoLevelWeight(values, row_scales, None, spec, levels)


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
