"""GPTQ (Frantar et al., arXiv 2210.17323).

Columns are quantized one after another; the error of each is made up for by the columns that are
still to come, as the layer's inputs X tell: with `H = 2 X X^T` and U the upper Cholesky factor of
its inverse, `w_k -= (w_j - q_j) / U_jj * U_jk` for k > j.
"""

import torch
from torch import Tensor

from quant_kernels.weight import QuantizedWeight, QuantSpec

DAMPING = 0.01  # of the Hessian's mean diagonal, added to the diagonal, as in the paper
BLOCK = 128  # columns whose corrections of the later ones are made at once; the result is the same


def gptq(
    weight: Tensor, spec: QuantSpec, hessian: Tensor, act_order: bool = False
) -> QuantizedWeight:
    """Quantize float32 `[rows, columns]`.

    Args:
        weight: the matrix.
        spec: bits, group size and symmetry.
        hessian: float32 `[columns, columns]`, `X X^T` of the layer's inputs in any unit.
        act_order: take the columns by falling diagonal of the Hessian. Scales and zero points are
            then those of the original weights, so that groups stay consecutive columns; otherwise
            a group's are fitted when its turn comes, to weights that make up for earlier errors.
    """
    rows, columns = weight.shape
    size, left = spec.size(columns), weight.clone()
    dead = hessian.diagonal() == 0
    left[:, dead] = 0  # what multiplies nothing but zeros
    scales, zeros = spec.qparams(left)
    order = hessian.diagonal().argsort(descending=True) if act_order else torch.arange(columns)
    upper = inverse_factor(hessian[order][:, order])
    left = left[:, order]
    quantized = torch.empty(rows, columns, dtype=torch.uint8)
    for start in range(0, columns, BLOCK):
        end = min(start + BLOCK, columns)
        errors = torch.zeros(rows, end - start)
        for place in range(start, end):
            column = int(order[place])
            group = column // size
            if not act_order and column % size == 0:
                # The columns behind this block have yet to hear of its errors.
                now = left[:, column : column + size].clone()
                now[:, end - column :] -= (
                    errors[:, : place - start] @ upper[start:place, end : column + size]
                )
                fitted = QuantSpec(spec.bits, None, spec.symmetric).qparams(now)
                scales[:, group : group + 1] = fitted[0]
                if zeros is not None and fitted[1] is not None:
                    zeros[:, group : group + 1] = fitted[1]
            value, scale = left[:, place], scales[:, group]
            zero = None if zeros is None else zeros[:, group]
            quantized[:, column] = spec.quantize(value, scale, zero)
            back = spec.dequantize(quantized[:, column], scale, zero)
            errors[:, place - start] = error = (value - back) / upper[place, place]
            left[:, place:end] -= torch.outer(error, upper[place, place:end])
        left[:, end:] -= errors @ upper[start:end, end:]
    return QuantizedWeight(quantized, scales, zeros, spec)


def inverse_factor(hessian: Tensor) -> Tensor:
    """Return the upper Cholesky factor of the damped inverse, float32 `[columns, columns]`."""
    damped = hessian.double()
    diagonal = damped.diagonal()
    diagonal[diagonal == 0] = 1
    diagonal += DAMPING * diagonal.mean()
    inverse = torch.cholesky_inverse(torch.linalg.cholesky(damped))
    return torch.linalg.cholesky(inverse, upper=True).float()
