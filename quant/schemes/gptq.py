"""GPTQ (Frantar et al., arXiv 2210.17323).

Columns are quantized one after another; the error of each is made up for by the columns that are
still to come, as the layer's inputs X tell: with `H = 2 X X^T` and U the upper Cholesky factor of
its inverse, `w_k -= (w_j - q_j) / U_jj * U_jk` for k > j.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from quant.schemes.search import search_qparams
from quant_kernels.weight import QuantizedWeight, QuantSpec

DAMPING = 0.01  # of the Hessian's mean diagonal, added to the diagonal, as in the paper
BLOCK = 128  # columns whose corrections of the later ones are made at once; the result is the same


def gptq(
    weight: Tensor,
    spec: QuantSpec,
    hessian: Tensor,
    act_order: bool = False,
    search: bool = False,
) -> QuantizedWeight:
    """Quantize float32 `[rows, columns]`.

    Args:
        weight: the matrix.
        spec: bits, group size and symmetry.
        hessian: float32 `[columns, columns]`, `X X^T` of the layer's inputs in any unit.
        act_order: take the columns by falling diagonal of the Hessian. Scales and zero points are
            then those of the original weights, so that groups stay consecutive columns; otherwise
            a group's are fitted when its turn comes, to weights that make up for earlier errors.
        search: choose scales and zero points by their error (`search_qparams`), not by extremes.
    """
    columns = weight.shape[1]
    left = without_dead_columns(weight, hessian)
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(columns)
    upper = inverse_factor(hessian[order][:, order])
    importance = torch.empty(columns)
    importance[order] = upper.diagonal() ** -2  # what a column's squared error costs
    if search:
        scales, zeros = search_qparams(left, importance, spec)
    else:
        scales, zeros = spec.qparams(left)
    own = QuantSpec(spec.bits, None, spec.symmetric)

    def fit(group: int, begin: int, now: Tensor) -> None:
        found = own.qparams(now)
        if search:
            found = search_qparams(now, importance[begin : begin + now.shape[1]], own)
        scales[:, group : group + 1] = found[0]
        if zeros is not None and found[1] is not None:
            zeros[:, group : group + 1] = found[1]

    def of_group(group: int) -> tuple[Tensor, Tensor | None]:
        return scales[:, group], None if zeros is None else zeros[:, group]

    fit_group = None if act_order else fit
    return QuantizedWeight(
        with_feedback(left, spec, upper, order, of_group, fit_group), scales, zeros, spec
    )


def without_dead_columns(weight: Tensor, hessian: Tensor) -> Tensor:
    """Return a copy with zeros in columns that multiply nothing but zeros."""
    left = weight.clone()
    left[:, hessian.diagonal() == 0] = 0
    return left


def with_feedback(
    weight: Tensor,
    spec: QuantSpec,
    upper: Tensor,
    order: Tensor,
    qparams: Callable[[int], tuple[Tensor, Tensor | None]],
    fit: Callable[[int, int, Tensor], None] | None,
) -> Tensor:
    """Quantize columns one after another, each error made up for by the columns to come.

    Args:
        weight: float32 `[rows, columns]`.
        spec: bits and group size.
        upper: `inverse_factor` of the Hessian in this order.
        order: columns in the order they are taken.
        qparams: returns a group's scales and zero points, each `[rows]`.
        fit: called with a group, its first column and its weights as they are when its turn comes;
            only for columns in their own order.

    Returns:
        Quantized values uint8 `[rows, columns]`.
    """
    rows, columns = weight.shape
    size, left = spec.size(columns), weight[:, order]
    quantized = torch.empty(rows, columns, dtype=torch.uint8)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.zeros(rows, end - start)
        for place in range(start, end):
            column = int(order[place])
            if fit is not None and column % size == 0:
                # The columns behind this block have yet to hear of its errors.
                now = left[:, column : column + size].clone()
                now[:, end - column :] -= (
                    errors[:, : place - start] @ upper[start:place, end : column + size]
                )
                fit(column // size, column, now)
            value, (scale, zero) = left[:, place], qparams(column // size)
            quantized[:, column] = spec.quantize(value, scale, zero)
            back = spec.dequantize(quantized[:, column], scale, zero)
            errors[:, place - start] = error = (value - back) / upper[place, place]
            left[:, place:end] -= torch.outer(error, upper[place, place:end])
        left[:, end:] -= errors @ upper[start:end, end:]
    return quantized


def damped(hessian: Tensor) -> Tensor:
    """Return a Hessian that can be inverted, float64 `[columns, columns]`."""
    found = hessian.to(torch.float64, copy=True)
    diagonal = found.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    return found


def inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the damped inverse, float32 `[columns, columns]`."""
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped(hessian)))
    return torch.linalg.cholesky(inverse, upper=True).float()
