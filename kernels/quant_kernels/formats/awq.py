"""AWQ checkpoints as AutoAWQ and its successors write them (`quant_method: awq`, version gemm).

`qweight` int32 `[columns, rows / 8]` and `qzeros` int32 `[groups, rows / 8]` have 4-bit values of
eight rows in a word, in an order that AWQ's GPU kernel wants; `scales` are `[groups, rows]`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from quant_kernels.formats.reader import Reader, check_shapes, excluded
from quant_kernels.pack import unpack
from quant_kernels.weight import QuantizedWeight, QuantSpec

PLACES = [0, 4, 1, 5, 2, 6, 3, 7]
"""Where in a word each of eight rows is."""


def reader(config: Mapping[str, Any]) -> Reader:
    """Return the reader for an entry `quantization_config`.

    Raises:
        ValueError: with one line: it cannot be read.
    """
    bits = config.get("bits", config.get("w_bit"))
    group_size = config.get("group_size", config.get("q_group_size"))
    version = str(config.get("version", "gemm")).lower()
    if bits != 4 or version != "gemm" or not config.get("zero_point", True):
        raise ValueError(
            f"AWQ with {bits} bits, version {version}, zero_point {config.get('zero_point', True)} "
            "cannot be read: 4 bits, version gemm, with zero points can"
        )
    spec = QuantSpec(4, None if group_size == -1 else group_size, symmetric=False)

    def read(parts: Mapping[str, Tensor]) -> QuantizedWeight:
        values, zeros = unpack_rows(parts["qweight"]), unpack_rows(parts["qzeros"])
        scales = parts["scales"].T.contiguous()
        check_shapes(values, scales, zeros, spec)
        return QuantizedWeight(values, scales, zeros, spec)

    return Reader(
        spec,
        frozenset({"qweight", "qzeros", "scales"}),
        read,
        ignore=("lm_head", *excluded(config.get("modules_to_not_convert"))),
    )


def unpack_rows(packed: Tensor) -> Tensor:
    """Return uint8 `[rows, n]` of int32 `[n, rows / 8]`."""
    values = unpack(packed, 4, packed.shape[1] * 8)
    return values.view(len(values), -1, 8)[:, :, PLACES].reshape(len(values), -1).T.contiguous()
