"""GGUF files of Llama models: how their tensors are read and written (llama.cpp's `ggml-quants`).

Blocks of 32 columns with a scale, or a scale and a minimum, are held exactly: Q4_0, Q5_0 and Q8_0
as they are; Q4_1, Q5_1, Q4_K and Q5_K with zero points `-minimum / scale` in float32. The other
types have blocks of 16 columns, or tables; they are dequantized. The package gguf does that, and
reads and writes the files.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from quant_kernels.weight import QuantizedWeight, QuantSpec

BLOCK = 32
LARGE = 256
"""Columns of a block of the K types, which is eight groups of 32."""

NAMES = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
"""Of tensors in GGUF and in transformers; those of layer N begin with `blk.N.` and
`model.layers.N.`."""
OURS = {name: theirs for theirs, name in NAMES.items()}

Bytes = NDArray[np.uint8]


def our_name(name: str) -> str | None:
    """Return the name in transformers of a GGUF tensor, None if a Llama has none of this name."""
    layer = re.fullmatch(r"blk\.(\d+)\.(\w+)\.(weight|bias)", name)
    if layer and layer[2] in NAMES:
        return f"model.layers.{layer[1]}.{NAMES[layer[2]]}.{layer[3]}"
    whole = re.fullmatch(r"(\w+)\.weight", name)
    return f"{NAMES[whole[1]]}.weight" if whole and whole[1] in NAMES else None


def their_name(name: str) -> str:
    """Return the name in GGUF of a Llama's tensor."""
    layer = re.fullmatch(r"model\.layers\.(\d+)\.(.+)\.(weight|bias)", name)
    if layer:
        return f"blk.{layer[1]}.{OURS[layer[2]]}.{layer[3]}"
    return f"{OURS[name.removesuffix('.weight')]}.weight"


def rope_rows(rows: int, heads: int) -> Tensor:
    """Return for each row of a query or key projection in transformers its row in GGUF, where the
    two halves of a head that RoPE rotates alternate; int64 `[rows]`.

    Raises:
        ValueError: with one line: the rows are not those of so many heads.
    """
    if rows % (2 * heads):
        raise ValueError(f"{rows} rows of queries or keys are not those of {heads} heads")
    return torch.arange(rows).view(heads, -1, 2).transpose(1, 2).flatten()


def read_blocks(data: Bytes, kind: str) -> QuantizedWeight | None:
    """Return a matrix; None if its type is none that is held exactly.

    Args:
        data: bytes `[rows, bytes of a row]`.
        kind: the name of its type.
    """
    if kind not in READERS:
        return None
    bits, size, read = READERS[kind]
    values, scales, minima = read(data.reshape(-1, size))
    groups = (len(data), -1)
    matrix = torch.from_numpy(values.astype(np.uint8)).view(len(data), -1)
    scale = torch.from_numpy(np.ascontiguousarray(scales, np.float32)).view(groups)
    if minima is None:
        return QuantizedWeight(matrix, scale, None, QuantSpec(bits, BLOCK, symmetric=True))
    minimum = torch.from_numpy(np.ascontiguousarray(minima, np.float32)).view(groups)
    # Without a scale a group is its minimum everywhere: one step of that size above 0.
    flat = scale == 0
    matrix = torch.where(flat.repeat_interleave(BLOCK, 1), 1, matrix).to(torch.uint8)
    zeros = torch.where(flat, 0, -minimum / torch.where(flat, 1, scale))
    scale = torch.where(flat, minimum, scale)
    return QuantizedWeight(matrix, scale, zeros, QuantSpec(bits, BLOCK))


Blocks = tuple[NDArray[Any], NDArray[Any], NDArray[Any] | None]


def halves(data: Bytes) -> NDArray[np.float32]:
    """Return float16 numbers `[blocks, n]`."""
    return np.ascontiguousarray(data).view(np.float16).astype(np.float32)


def nibbles(data: Bytes) -> Bytes:
    """Return the lower halves of all bytes, then the upper ones, `[blocks, 2 n]`."""
    return np.concatenate((data & 15, data >> 4), 1)


def fifth_bits(data: Bytes) -> Bytes:
    """Return 16 times each bit, `[blocks, 32]`."""
    return np.unpackbits(data, axis=1, bitorder="little") * np.uint8(16)


def q4_0(data: Bytes) -> Blocks:
    return nibbles(data[:, 2:]), halves(data[:, :2]), None


def q4_1(data: Bytes) -> Blocks:
    return nibbles(data[:, 4:]), halves(data[:, :2]), halves(data[:, 2:4])


def q5_0(data: Bytes) -> Blocks:
    return nibbles(data[:, 6:]) | fifth_bits(data[:, 2:6]), halves(data[:, :2]), None


def q5_1(data: Bytes) -> Blocks:
    values = nibbles(data[:, 8:]) | fifth_bits(data[:, 4:8])
    return values, halves(data[:, :2]), halves(data[:, 2:4])


def q8_0(data: Bytes) -> Blocks:
    return data[:, 2:] ^ 128, halves(data[:, :2]), None  # signed, to above the midpoint


def large(data: Bytes) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Return scales and minima `[blocks, 8]` of the types Q4_K and Q5_K: two of 16 bits a block,
    and eight of 6 bits each in twelve bytes."""
    d, low, middle, high = halves(data[:, :4]), data[:, 4:8], data[:, 8:12], data[:, 12:16]
    scales = np.concatenate((low & 63, (high & 15) | (low >> 6 << 4)), 1)
    minima = np.concatenate((middle & 63, (high >> 4) | (middle >> 6 << 4)), 1)
    return d[:, :1] * scales, -d[:, 1:] * minima


def pairs(data: Bytes) -> Bytes:
    """Return values `[blocks, 256]` of 32 bytes for every two groups."""
    return nibbles(data.reshape(-1, BLOCK)).reshape(-1, LARGE)


def q4_k(data: Bytes) -> Blocks:
    return pairs(data[:, 16:]), *large(data)


def q5_k(data: Bytes) -> Blocks:
    fifth = data[:, 16:48, None] >> np.arange(8, dtype=np.uint8) & 1  # bit g is of group g
    values = pairs(data[:, 48:]) | fifth.transpose(0, 2, 1).reshape(-1, LARGE) << 4
    return values, *large(data)


READERS: dict[str, tuple[int, int, Callable[[Bytes], Blocks]]] = {
    "Q4_0": (4, 18, q4_0),
    "Q4_1": (4, 20, q4_1),
    "Q5_0": (5, 22, q5_0),
    "Q5_1": (5, 24, q5_1),
    "Q8_0": (8, 34, q8_0),
    "Q4_K": (4, 144, q4_k),
    "Q5_K": (5, 176, q5_k),
}
"""Types that are held exactly: bits of a value, bytes of a block, and what reads blocks."""


def holding(spec: QuantSpec, columns: int) -> str | None:
    """Return why no type holds a weight's values, None if one does.

    Args:
        spec: how it is quantized, with zero points that are quantized values.
        columns: of the matrix.
    """
    if columns % BLOCK:
        return f"its {columns} columns are no blocks of {BLOCK}"
    if spec.group_size is not None and spec.group_size % BLOCK:
        return f"groups of {spec.group_size} columns are no blocks of {BLOCK}"
    if spec.bits == 8 and not spec.symmetric:
        return "8 bits with zero points need 9: use --symmetric"
    return None


def write_blocks(weight: QuantizedWeight) -> tuple[Bytes, str]:
    """Return a matrix in the smallest type that holds it exactly: bytes `[rows, bytes of a row]`,
    and the type's name.

    Raises:
        ValueError: with one line: none does.
    """
    values, spec, zeros = weight.values, weight.spec, weight.zeros
    rows, columns = values.shape
    why = holding(spec, columns)
    if weight.g_idx is not None or (zeros is not None and zeros.is_floating_point()):
        why = "act order, and zero points between quantized values, have no place there"
    if why:
        raise ValueError(f"no type of GGUF holds its values: {why}")
    zero = spec.midpoint if zeros is None else weight.expand(zeros).short()
    signed = (values.short() - zero).view(-1, BLOCK).numpy()
    blocks = weight.expand(weight.scales)[:, ::BLOCK].reshape(-1, 1)
    scales = blocks.to(torch.float16)
    if not torch.equal(scales.double(), blocks.double()):
        raise ValueError("no type of GGUF holds its values: a scale is no number in float16")
    d = scales.numpy().view(np.uint8)
    low, high = int(signed.min()), int(signed.max())
    if low >= -8 and high < 8:
        data, kind = [d, halved(signed + 8)], "Q4_0"
    elif low >= -16 and high < 16:
        fifth = np.packbits(signed + 16 >> 4, axis=1, bitorder="little")
        data, kind = [d, fifth, halved(signed + 16 & 15)], "Q5_0"
    elif low >= -128 and high < 128:
        data, kind = [d, signed.astype(np.int8).view(np.uint8)], "Q8_0"
    else:
        raise ValueError("no type of GGUF holds its values: they need more than 8 bits")
    return np.concatenate(data, 1).reshape(rows, -1), kind


def halved(values: NDArray[Any]) -> Bytes:
    """Return bytes `[blocks, 16]` of 4-bit values `[blocks, 32]`, as `nibbles` reads them."""
    return (values[:, :16] | values[:, 16:] << 4).astype(np.uint8)
