"""Round to nearest: each weight takes the nearest of the values between its group's extremes."""

from torch import Tensor

from quant_kernels.weight import QuantizedWeight, QuantSpec


def rtn(weight: Tensor, spec: QuantSpec) -> QuantizedWeight:
    """Quantize float32 `[rows, columns]`."""
    scales, zeros = spec.qparams(weight)
    columns = weight.shape[1]
    expanded = None if zeros is None else spec.expand(zeros, columns)
    return QuantizedWeight(
        spec.quantize(weight, spec.expand(scales, columns), expanded), scales, zeros, spec
    )
