"""bitsandbytes checkpoints as transformers writes them (`quant_method: bitsandbytes`).

- 8 bits (LLM.int8()): `weight` int8 `[rows, columns]` and the largest absolute value of each row,
  `SCB`.
- 4 bits (NF4, FP4): `weight` has two values a byte, the first in the upper half; each is the index
  of a number in `quant_map`, times the `absmax` of its block of the flattened matrix. With double
  quantization `absmax` is quantized in the same way, less an offset.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from quant_kernels.formats.reader import WEIGHT, Reader, check_shapes, excluded
from quant_kernels.weight import BlockWeight, QuantizedWeight, QuantSpec

INT8 = QuantSpec(8, None, symmetric=True)


def reader(config: Mapping[str, Any]) -> Reader:
    """Return the reader for an entry `quantization_config`.

    Raises:
        ValueError: with one line: it cannot be read.
    """
    ignore = ("lm_head", *excluded(config.get("llm_int8_skip_modules")))
    if config.get("load_in_8bit"):
        parts = frozenset({WEIGHT, "SCB"})
        return Reader(INT8, parts, read_int8, ignore, frozenset({"weight_format"}))
    kind = config.get("bnb_4bit_quant_type", "fp4")
    if config.get("bnb_4bit_quant_storage", "uint8") != "uint8":
        raise ValueError(
            f"bitsandbytes stored as {config['bnb_4bit_quant_storage']} cannot be read: quantize "
            "it again with bnb_4bit_quant_storage uint8"
        )
    state = f"weight.quant_state.bitsandbytes__{kind}"
    names = {WEIGHT, state, "weight.absmax", "weight.quant_map"}
    if config.get("bnb_4bit_use_double_quant"):
        names |= {"weight.nested_absmax", "weight.nested_quant_map"}

    def read(parts: Mapping[str, Tensor]) -> BlockWeight:
        return read_4bit(parts, json.loads(bytes(parts[state].tolist())))

    return Reader(None, frozenset(names), read, ignore)


def read_int8(parts: Mapping[str, Tensor]) -> QuantizedWeight:
    """Return a weight of 8 bits: a value of 127 is the row's largest one."""
    values = (parts[WEIGHT].short() + INT8.midpoint).to(torch.uint8)
    scales = parts["SCB"].float()[:, None] / 127
    check_shapes(values, scales, None, INT8)
    return QuantizedWeight(values, scales, None, INT8)


def read_4bit(parts: Mapping[str, Tensor], state: Mapping[str, Any]) -> BlockWeight:
    """Return a weight of 4 bits; `state` is what `quant_state` says."""
    packed = parts[WEIGHT].flatten()
    values = torch.stack((packed >> 4, packed & 15), 1).view(state["shape"])
    scales = parts["weight.absmax"]
    if "nested_blocksize" in state:
        nested = parts["weight.nested_absmax"].repeat_interleave(state["nested_blocksize"])
        table = parts["weight.nested_quant_map"]
        scales = table[scales.long()] * nested[: len(scales)] + state["nested_offset"]
    spec = QuantSpec(4, state["blocksize"], symmetric=True)
    table, blocks = parts["weight.quant_map"], -(-values.numel() // state["blocksize"])
    if values.dim() != 2 or scales.shape != (blocks,) or table.shape != (16,):
        raise ValueError(
            f"a matrix {list(values.shape)} has {blocks} blocks of {state['blocksize']} numbers, "
            f"and a table of 16, not {list(scales.shape)} and {list(table.shape)}"
        )
    if not bool(torch.isfinite(scales).all() & torch.isfinite(table).all()):
        raise ValueError("its scales or its table are not all numbers")
    return BlockWeight(values, scales.float(), None, spec, table=table)
