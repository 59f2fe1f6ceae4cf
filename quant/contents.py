"""A quantized checkpoint in memory: its layers as what is stored of them, whoever quantized it."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from attnserve.errors import UserError
from hf_attn.files import tensor_shapes, weight_files
from quant.checks import check_numbers, check_tensors
from quant_kernels.formats import READERS, reader_of
from quant_kernels.formats.packed import (
    PARTS,
    check_entry,
    entry_for,
    entry_of,
    is_packed,
    read_stored,
)
from quant_kernels.weight import BlockWeight, QuantizedWeight

EMBEDDINGS = "model.embed_tokens"
FUSED = (
    ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    ("mlp.gate_proj", "mlp.up_proj"),
)
"""Layers of a decoder layer that vLLM computes as one, so that they must be stored alike."""


@dataclass(frozen=True)
class Contents:
    """What a checkpoint holds.

    Args:
        config: config.json, without `quantization_config`.
        weights: quantized layers by name.
        rest: the other tensors by name.
    """

    config: Mapping[str, Any]
    weights: Mapping[str, QuantizedWeight]
    rest: Mapping[str, Tensor]

    def check(self, source: Path, model: nn.Module) -> None:
        """Check that these are the tensors of a model, with numbers in them.

        Raises:
            UserError: with one line.
        """
        shapes = {f"{layer}.weight": weight.values.shape for layer, weight in self.weights.items()}
        check_tensors(source, model, shapes | {name: x.shape for name, x in self.rest.items()})
        for name, tensor in self.rest.items():
            check_numbers(source, name, tensor)
        for layer, weight in self.weights.items():
            if not bool(torch.isfinite(weight.scales).all()):
                raise UserError(f"{layer} in {source} has scales that are no numbers")


def read_checkpoint(folder: Path, model: nn.Module) -> Contents:
    """Return a quantized checkpoint in the format of GPTQ, AWQ, bitsandbytes or compressed-tensors.

    Args:
        folder: the checkpoint.
        model: as its configuration describes it, without weights.

    Raises:
        UserError, ValueError: with one line: it is no such checkpoint.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    entry = config.pop("quantization_config", None)
    if entry is None:
        raise UserError(f"{folder} is not quantized: python -m quant.quantize does that")
    if not isinstance(entry, dict):
        raise UserError(f"quantization_config in config.json of {folder} is no object: copy it")
    method = str(entry.get("quant_method"))
    if "config_groups" in entry:
        check_entry(entry)
    if not tensor_shapes(folder):  # broken files are said
        raise UserError(f"{folder} has no *.safetensors: copy its weights too")
    stored = {name: x for file in weight_files(folder) for name, x in load_file(file).items()}
    if method in READERS:
        read = reader_of(entry).weights(stored.items())
    elif is_packed(entry):
        read = read_packed(stored, entry, model)
    else:
        raise UserError(
            f"{folder} has the format {entry.get('format') or method}, which cannot be converted: "
            f"{', '.join(READERS)} and pack-quantized can"
        )
    found = dict(read)
    weights = {name: x for name, x in found.items() if isinstance(x, QuantizedWeight)}
    rest = {name: x for name, x in found.items() if isinstance(x, Tensor)}
    return Contents(config, weights, without_zero_biases(rest, model))


def read_packed(
    stored: Mapping[str, Tensor], entry: Mapping[str, Any], model: nn.Module
) -> Iterator[tuple[str, Tensor | QuantizedWeight]]:
    """Yield the layers and other tensors of a checkpoint in compressed-tensors' packed format."""

    modules = dict(model.named_modules())

    def layer_of(name: str) -> str:
        layer, _, part = name.rpartition(".")
        return layer if part in PARTS else ""

    for layer, names in groupby(sorted(stored, key=layer_of), key=layer_of):
        if not layer:
            yield from ((name, stored[name]) for name in names)
            continue
        parts = {name.rpartition(".")[2]: stored[name] for name in names}
        kind = type(modules.get(layer)).__name__
        yield layer, read_stored(parts, entry_for(entry, layer, kind), layer)


def without_zero_biases(rest: Mapping[str, Tensor], model: nn.Module) -> dict[str, Tensor]:
    """Return tensors without those biases that AutoGPTQ has added to layers without one, all 0."""
    known = dict(model.named_parameters())
    return {
        name: tensor
        for name, tensor in rest.items()
        if name in known or not name.endswith(".bias") or bool(tensor.any())
    }


def servable(contents: Contents) -> Contents:
    """Return contents whose layers can be packed: those that vLLM fuses are stored alike, and what
    is no integer times a scale is dequantized."""
    weights, dense = contents.weights, blockwise(contents)
    for name in weights:
        for parts in FUSED:
            parent = name.removesuffix(parts[0])
            if parent == name:
                continue
            together = [parent + part for part in parts]
            found = [weights.get(part) for part in together]
            if dense & set(together) or not all(alike(found[0], weight) for weight in found):
                dense |= {part for part in together if part in weights}
    return dequantized(contents, dense)


def blockwise(contents: Contents) -> set[str]:
    """Return the layers whose values are no integers times a scale."""
    return {name for name, weight in contents.weights.items() if isinstance(weight, BlockWeight)}


def dequantized(contents: Contents, layers: Collection[str]) -> Contents:
    """Return contents with layers dequantized: to the checkpoint's dtype if their values are no
    integers times a scale, else to float32, which holds them."""
    weights, rest = dict(contents.weights), dict(contents.rest)
    named = contents.config.get("dtype") or contents.config.get("torch_dtype") or "float32"
    dtype = getattr(torch, str(named))
    for name in layers:
        weight = weights.pop(name)
        kind = dtype if isinstance(weight, BlockWeight) else torch.float32
        rest[f"{name}.weight"] = weight.dequantize().to(kind)
    return Contents(contents.config, weights, rest)


def alike(a: QuantizedWeight | None, b: QuantizedWeight | None) -> bool:
    """Return whether two weights can be rows of one."""
    if a is None or b is None:
        return a is b
    same_order = a.g_idx is b.g_idx or (
        a.g_idx is not None and b.g_idx is not None and torch.equal(a.g_idx, b.g_idx)
    )
    return same_order and entry_of(a) == entry_of(b)
