"""A quantized checkpoint's folder, in compressed-tensors' formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from quant_kernels.pack import pack
from quant_kernels.weight import QuantizedWeight

COPIED = ("*.json", "*.txt", "*.md", "*.model", "*.jinja", "*.py", "LICENSE*")
"""Tokenizer, generation settings, card, code that `auto_map` names."""
INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Part:
    """Some of the checkpoint's numbers.

    Args:
        name: of the part.
        numbers: how many.
        before, after: their bytes.
    """

    name: str
    numbers: int
    before: int
    after: int


@dataclass(frozen=True)
class Format:
    """One of compressed-tensors' formats.

    Args:
        name: as it calls it.
        tensors: of a layer, by name.
        activations: how inputs of linear layers are rounded; None: not at all.
    """

    name: str
    tensors: Callable[[QuantizedWeight], dict[str, Tensor]]
    activations: dict[str, Any] | None = None


def written_format(activations: bool) -> Format:
    """Packed weights; with 8-bit activations the one that vLLM has an int8 kernel for."""
    if not activations:
        return Format("pack-quantized", packed_tensors)
    token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    return Format("int-quantized", int8_tensors, token)


def checkpoint_tensors(folder: Path) -> set[str]:
    """The names of all tensors in a folder's safetensors."""
    names: set[str] = set()
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as opened:
            names.update(opened.keys())
    return names


def write_checkpoint(
    source: Path,
    out: Path,
    quantized: Mapping[str, QuantizedWeight],
    tables: Sequence[str],
    form: Format,
    made_by: str,
) -> list[Part]:
    """Write a folder like `source` with quantized weights packed.

    Args:
        source: the checkpoint.
        out: a folder that is not there yet.
        quantized: by layer.
        tables: which of them are embeddings or heads.
        form: what to write.
        made_by: the command, and whatever the card is to say beside it.

    Returns:
        What became of linear layers, embeddings, the rest, and all of it.
    """
    out.mkdir()
    sizes: dict[str, list[int]] = {}
    places: dict[str, str] = {}
    for file in sorted(source.glob("*.safetensors")):
        tensors: dict[str, Tensor] = {}
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  it has no iterator
                tensor = opened.get_tensor(name)
                layer = name.removesuffix(".weight")
                new = {name: tensor}
                if layer in quantized:
                    stored = form.tensors(quantized[layer])
                    new = {f"{layer}.{part}": t.contiguous() for part, t in stored.items()}
                part = "rest" if layer not in quantized else "linear"
                part = "embeddings" if layer in tables else part
                size = sizes.setdefault(part, [0, 0, 0])
                for i, count in enumerate(
                    (tensor.numel(), bytes_of(tensor), sum(map(bytes_of, new.values())))
                ):
                    size[i] += count
                tensors |= new
        save_file(tensors, out / file.name, metadata={"format": "pt"})
        places |= dict.fromkeys(tensors, file.name)
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.name not in ("config.json", INDEX):
                shutil.copy(file, out)
    total = [sum(size[i] for size in sizes.values()) for i in range(3)]
    if (source / INDEX).exists():
        index = {"metadata": {"total_size": total[2]}, "weight_map": places}
        (out / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(quantized, tables, form)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    add_to_card(out, source.resolve().name, made_by)
    order = [name for name in ("linear", "embeddings", "rest") if name in sizes]
    return [*(Part(name, *sizes[name]) for name in order), Part("all", *total)]


def bytes_of(tensor: Tensor) -> int:
    """Of its elements."""
    return tensor.numel() * tensor.element_size()


def packed_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """A layer's tensors in the format `pack-quantized`."""
    bits = weight.spec.bits
    tensors = {
        "weight_packed": pack(weight.values, bits),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.values.shape),
    }
    if weight.zeros is not None:
        zeros = weight.zeros
        if zeros.dtype == torch.uint8:
            zeros = pack(zeros.T.contiguous(), bits).T
        tensors["weight_zero_point"] = zeros
    return tensors


def int8_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """A layer's tensors in the format `int-quantized`: 8 bits, symmetric, a scale for each row."""
    signed = (weight.values.short() - weight.spec.midpoint).to(torch.int8)
    return {"weight": signed, "weight_scale": weight.scales}


def quantization_config(
    quantized: Mapping[str, QuantizedWeight], tables: Sequence[str], form: Format
) -> dict[str, Any]:
    """The entry of `config.json`: one group for linear layers, one for embeddings and head."""
    linear = next(weight for layer, weight in quantized.items() if layer not in tables)
    groups = {"group_0": config_group(["Linear"], linear, form)}
    if tables:
        # vLLM does not tell embeddings their name. A tied head has no tensors of its own.
        groups["group_1"] = config_group(["Embedding", "lm_head"], quantized[tables[0]], form)
    return {
        "quant_method": "compressed-tensors",
        "format": form.name,
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [] if tables else ["lm_head"],
        "kv_cache_scheme": None,
    }


def config_group(targets: list[str], weight: QuantizedWeight, form: Format) -> dict[str, Any]:
    """What some layers have in common."""
    spec = weight.spec
    weights: dict[str, Any] = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "channel" if spec.group_size is None else "group",
        "group_size": spec.group_size,
        "dynamic": False,
    }
    if weight.zeros is not None and weight.zeros.dtype != torch.uint8:
        weights["zp_dtype"] = str(weight.zeros.dtype)
    return {
        "targets": targets,
        "weights": weights,
        "input_activations": form.activations,
        "output_activations": None,
    }


def add_to_card(folder: Path, name: str, made_by: str) -> None:
    """Say in README.md how it was made."""
    card = folder / "README.md"
    old = card.read_text(encoding="utf-8").rstrip() + "\n\n" if card.exists() else ""
    text = (
        f"## Quantized\n\n`{name}` with attnserve's {made_by}. What is said above of weights, "
        "sizes and results is of the original.\n"
    )
    card.write_text(old + text, encoding="utf-8")
