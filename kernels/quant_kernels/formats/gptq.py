"""GPTQ checkpoints as AutoGPTQ, GPTQModel and AutoRound write them (`quant_method: gptq`).

`qweight` int32 `[columns * bits / 32, rows]` is packed along the columns of the matrix, `qzeros`
int32 `[groups, rows * bits / 32]` along its rows, `scales` are `[groups, rows]`, and `g_idx`
`[columns]` names the group of each column. The first version of the format stores zero points less
one.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant_kernels.formats.reader import Reader, check_shapes
from quant_kernels.pack import unpack
from quant_kernels.weight import QuantizedWeight, QuantSpec

BITS = (2, 3, 4, 8)


def reader(config: Mapping[str, Any]) -> Reader:
    """Return the reader for an entry `quantization_config`.

    Raises:
        ValueError: with one line: it cannot be read.
    """
    bits, group_size = config["bits"], config["group_size"]
    layout = config.get("checkpoint_format") or config.get("format") or "gptq"
    if bits not in BITS or layout not in ("gptq", "gptq_v2"):
        raise ValueError(
            f"GPTQ with {bits} bits in the format {layout} cannot be read: 2, 3, 4 and 8 bits in "
            "the formats gptq and gptq_v2 can"
        )
    if config.get("pack_dtype") not in (None, "int32"):
        raise ValueError(f"GPTQ packed into {config['pack_dtype']} cannot be read: int32 can")
    dynamic = config.get("dynamic") or {}
    if rules := [rule for rule in dynamic if not rule.startswith("-:")]:
        raise ValueError(
            f"GPTQ with other bits or groups in some layers (dynamic: {rules[0]}) cannot be read: "
            "quantize all layers alike, or leave some out with -:"
        )
    channel = group_size == -1
    act_order = bool(config.get("desc_act")) and not channel
    spec = QuantSpec(bits, None if channel else group_size, symmetric=False)

    def read(parts: Mapping[str, Tensor]) -> QuantizedWeight:
        columns = parts["qweight"].shape[0] * 32 // bits
        values = unpack(parts["qweight"].T.contiguous(), bits, columns)
        zeros = unpack_zeros(parts["qzeros"], bits, len(values), layout == "gptq").T
        scales = parts["scales"].T
        g_idx = parts["g_idx"].int() if act_order else None
        check_shapes(values, scales, zeros, spec, g_idx)
        return QuantizedWeight(values, scales.contiguous(), zeros.contiguous(), spec, g_idx)

    parts = {"qweight", "qzeros", "scales"} | ({"g_idx"} if act_order else set())
    return Reader(
        spec,
        frozenset(parts),
        read,
        ignore=(
            *(() if config.get("lm_head") else ("lm_head",)),
            *(f"re:{rule.removeprefix('-:')}" for rule in dynamic),
        ),
        unused=frozenset() if act_order else frozenset({"g_idx"}),
        act_order=act_order,
    )


def unpack_zeros(packed: Tensor, bits: int, rows: int, less_one: bool) -> Tensor:
    """Return zero points uint8 `[groups, rows]`.

    Args:
        packed: `qzeros`.
        bits: of a zero point.
        rows: of the matrix.
        less_one: whether one was subtracted. GPTQModel did so from whole words, so that the borrow
            of a zero point of 0 is in the next one; of 3 bits from each alone.
    """
    if less_one and 32 % bits == 0:
        ones = sum(1 << shift for shift in range(0, 32, bits))
        packed = ((packed.long() & 0xFFFFFFFF) + ones).to(torch.int32)
    zeros = unpack(packed, bits, rows)
    if less_one and 32 % bits:
        zeros = zeros + 1 & 2**bits - 1
    return zeros
