"""Layers that other libraries quantized are read as they themselves read them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors import safe_open
from torch import Tensor

from quant_kernels.formats import READERS, gguf, reader_of
from quant_kernels.formats.packed import (
    PARTS,
    entry_of,
    packed_tensors,
    read_stored,
    stored_tensors,
)
from quant_kernels.pack import pack, unpack
from quant_kernels.weight import BlockWeight, QuantizedWeight, QuantSpec, group_order

FOREIGN = sorted((Path(__file__).parent / "foreign").glob("*.safetensors"))


def opened(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """Return what config.json says, and the tensors: a layer's, and what its library reads."""
    with safe_open(file, framework="pt") as content:
        names = content.keys()
        tensors = {name: content.get_tensor(name) for name in names}
        return json.loads(content.metadata()["config"]), tensors


def read(config: dict[str, Any], tensors: dict[str, Tensor]) -> QuantizedWeight:
    """Return the one layer of a checkpoint."""
    if config["quant_method"] == "compressed-tensors":
        parts = {part: tensors[f"layer.{part}"] for part in PARTS if f"layer.{part}" in tensors}
        return read_stored(parts, config["weights"])
    found = dict(reader_of(config).weights(tensors.items()))
    assert found.keys() == {"layer", *({"other"} & tensors.keys())}
    weight = found["layer"]
    assert isinstance(weight, QuantizedWeight)
    return weight


def error_of(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, in units of the largest value of the row."""
    rows = expected.float().abs().amax(1, keepdim=True)
    return float(((found - expected.float()) / rows).abs().max())


@pytest.mark.parametrize("file", FOREIGN, ids=lambda file: file.stem)
def test_layers_of_other_libraries(file: Path) -> None:
    """They compute in 16 bits, some of them; the integers and scales are the same."""
    config, tensors = opened(file)
    expected = tensors.pop("dequantized")
    weight = read(config, tensors)
    half = expected.dtype == torch.float16
    assert error_of(weight.dequantize(), expected) < (2e-3 if half else 1e-6)
    assert expected.float().abs().amax() > 1


@pytest.mark.parametrize("file", FOREIGN, ids=lambda file: file.stem)
def test_they_are_stored_without_loss(file: Path) -> None:
    """As they are written, and as they are served."""
    config, tensors = opened(file)
    tensors.pop("dequantized")
    weight = read(config, tensors)
    if isinstance(weight, BlockWeight):
        reader = reader_of(config)
        ((name, dense),) = packed_tensors(tensors.items(), reader)
        assert name == "layer.weight" and torch.equal(dense, weight.dequantize())
        return
    again = read_stored(stored_tensors(weight), entry_of(weight))
    assert torch.equal(again.dequantize(), weight.dequantize())
    if config["quant_method"] in READERS:
        named = dict(packed_tensors(tensors.items(), reader_of(config)))
        stored = stored_tensors(weight)
        assert named.keys() == {f"layer.{part}" for part in stored}
        assert all(torch.equal(named[f"layer.{part}"], stored[part]) for part in stored)


@pytest.mark.parametrize("file", FOREIGN, ids=lambda file: file.stem)
def test_a_layer_without_one_of_its_tensors(file: Path) -> None:
    config, tensors = opened(file)
    if config["quant_method"] not in READERS:
        pytest.skip("compressed-tensors' own are looked at by their readers")
    tensors.pop("dequantized")
    tensors["other"] = torch.ones(3)
    reader = reader_of(config)
    for part in reader.parts:
        left = {name: tensor for name, tensor in tensors.items() if name != f"layer.{part}"}
        with pytest.raises(ValueError, match=rf"has no tensor layer\.{part}: it is incomplete"):
            list(reader.weights(left.items()))


def cut(tensors: dict[str, Tensor]) -> Iterator[dict[str, Tensor]]:
    """Yield the tensors with one of them cut in half, each in turn."""
    for name, tensor in tensors.items():
        if tensor.dim() == 2:
            yield tensors | {name: tensor[: len(tensor) // 2]}


@pytest.mark.parametrize("file", FOREIGN, ids=lambda file: file.stem)
def test_tensors_that_do_not_belong_together(file: Path) -> None:
    """One line that names the layer, and what is wrong."""
    config, tensors = opened(file)
    tensors.pop("dequantized")
    for broken in cut(tensors):
        with pytest.raises(ValueError):
            read(config, broken)


GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 64, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 64, "version": "gemm"}


@pytest.mark.parametrize(
    ("config", "says"),
    [
        (GPTQ | {"bits": 5}, "GPTQ with 5 bits in the format gptq cannot be read"),
        (GPTQ | {"checkpoint_format": "marlin"}, "in the format marlin cannot be read"),
        (GPTQ | {"pack_dtype": "int64"}, "GPTQ packed into int64 cannot be read"),
        (GPTQ | {"dynamic": {"+:.*": {"bits": 8}}}, r"in some layers \(dynamic: \+:\.\*\) cannot"),
        ({"quant_method": "gptq", "bits": 4}, "has no 'group_size': it is incomplete"),
        (AWQ | {"version": "gemv"}, "AWQ with 4 bits, version gemv, zero_point True cannot be"),
        (
            {"quant_method": "bitsandbytes", "bnb_4bit_quant_storage": "bfloat16"},
            "bitsandbytes stored as bfloat16 cannot be read",
        ),
    ],
)
def test_what_cannot_be_read(config: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        reader_of(config)


def test_packing_of_all_bits_and_sizes() -> None:
    """Value i of a row begins at bit `i * bits`; what is not needed of the last word is 0."""
    for bits in range(2, 9):
        for columns in (1, 31, 32, 33, 176):
            values = torch.randint(0, 2**bits, (3, columns), dtype=torch.uint8)
            packed = pack(values, bits)
            for row, words in zip(values.tolist(), packed.tolist(), strict=True):
                number = sum(value << i * bits for i, value in enumerate(row))
                stored = sum((word & 0xFFFFFFFF) << 32 * i for i, word in enumerate(words))
                assert stored == number
            assert torch.equal(unpack(packed, bits, columns), values)


def test_groups_of_another_size() -> None:
    """`g_idx` must name groups of the group size; only the last may be short."""
    spec = QuantSpec(4, 32)
    g_idx = torch.tensor([1] * 20 + [0] * 32, dtype=torch.int32)
    assert group_order(g_idx, spec).tolist() == [*range(20, 52), *range(20)]
    for other in (g_idx.flip(0) * 0, torch.cat((g_idx, g_idx)), g_idx + 1):
        with pytest.raises(ValueError, match="g_idx does not name groups of 32 columns"):
            group_order(other, spec)


@pytest.mark.parametrize("kind", sorted(gguf.READERS))
def test_blocks_of_gguf(kind: str) -> None:
    """Read as the package gguf reads them, whatever the bytes are."""
    quants = pytest.importorskip("gguf.quants")
    type_ = quants.GGMLQuantizationType[kind]
    size = gguf.READERS[kind][1]
    random = np.random.default_rng(0)
    data = random.integers(0, 256, (6, 2 * size), dtype=np.uint8)
    blocks = data.reshape(-1, size)
    blocks[:, 1] &= 0x3F  # scales: no infinity, and not all below 0
    if kind[-1] in "1K":
        blocks[:, 3] &= 0xBF
        blocks[0, :2] = 0  # a scale of 0
    expected = torch.from_numpy(quants.dequantize(data, type_)).double()
    weight = gguf.read_blocks(data, kind)
    assert weight is not None
    found = weight.dequantize().double()
    exact = kind.endswith("_0")
    assert torch.equal(found, expected) if exact else error_of(found, expected) < 1e-6
    again = read_stored(stored_tensors(weight), entry_of(weight))
    assert torch.equal(again.dequantize(), weight.dequantize())
    if exact:
        written, type_name = gguf.write_blocks(weight)
        assert type_name == kind and np.array_equal(written, data)


@pytest.mark.parametrize(
    ("spec", "kind"),
    [
        (QuantSpec(2, 64), "Q4_0"),
        (QuantSpec(3, None), "Q4_0"),
        (QuantSpec(4, 32), "Q5_0"),
        (QuantSpec(4, 96, symmetric=True), "Q4_0"),
        (QuantSpec(5, 32, symmetric=True), "Q5_0"),
        (QuantSpec(7, 64), "Q8_0"),
        (QuantSpec(8, None, symmetric=True), "Q8_0"),
    ],
)
def test_weights_that_gguf_holds(spec: QuantSpec, kind: str) -> None:
    quants = pytest.importorskip("gguf.quants")
    matrix = torch.randn(5, 192, generator=torch.Generator().manual_seed(0))
    scales, zeros = spec.qparams(matrix)
    values = torch.randint(0, spec.qmax + 1, matrix.shape, dtype=torch.uint8)
    values[:, 0], values[:, 1] = 0, spec.qmax
    if zeros is not None:
        zeros[0], zeros[1] = 0, spec.qmax
    weight = QuantizedWeight(values, scales, zeros, spec)
    data, found = gguf.write_blocks(weight)
    assert found == kind and gguf.holding(spec, 192) is None
    dense = quants.dequantize(data, quants.GGMLQuantizationType[kind])
    assert torch.equal(torch.from_numpy(dense), weight.dequantize())


def test_weights_that_gguf_does_not_hold() -> None:
    """Said of the format alone, or of the values."""
    values, scales = torch.zeros(2, 64, dtype=torch.uint8), torch.ones(2, 2)
    spec = QuantSpec(4, 32, symmetric=True)
    for weight, says in (
        (QuantizedWeight(values[:, :48], scales, None, spec), "48 columns are no blocks of 32"),
        (QuantizedWeight(values, scales, None, QuantSpec(4, 48)), "groups of 48 columns are no"),
        (QuantizedWeight(values, scales, scales.byte(), QuantSpec(8, 32)), "use --symmetric"),
        (QuantizedWeight(values, scales, scales.half(), QuantSpec(4, 32)), "act order, and zero"),
        (QuantizedWeight(values, scales + 1e-5, None, spec), "a scale is no number in float16"),
    ):
        with pytest.raises(ValueError, match=f"no type of GGUF holds its values: .*{says}"):
            gguf.write_blocks(weight)


def test_names_of_gguf() -> None:
    for theirs in ("token_embd", "blk.11.ffn_down", "output_norm", "blk.0.attn_q"):
        ours = gguf.our_name(f"{theirs}.weight")
        assert ours is not None and gguf.their_name(ours) == f"{theirs}.weight"
    assert gguf.our_name("rope_freqs.weight") is None
