"""Write quantized checkpoints as folders in compressed-tensors' formats."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import PreTrainedModel

from attn_kernels.kv_quant import FIELD
from attnserve.errors import UserError
from attnserve.files import check_writable, replacing
from quant.contents import EMBEDDINGS, Contents
from quant.model import HEAD
from quant_kernels.formats.packed import config_of, entry_of, format_of, stored_tensors
from quant_kernels.weight import QuantizedWeight

COPIED = ("*.json", "*.txt", "*.md", "*.model", "*.jinja", "*.py", "LICENSE*")
"""Tokenizer, generation settings, card, code that `auto_map` names."""
NOT_COPIED = (
    "config.json",
    "model.safetensors.index.json",
    "quantize_config.json",  # of GPTQ
    "quant_config.json",  # of AWQ
)
TOKENIZER = "tokenizer.json"


def check_out(source: Path, out: Path, overwrite: bool) -> None:
    """Check that a checkpoint can be written, and that nothing is overwritten that was not asked to
    be, or was not made here."""
    check_writable(out)
    if not out.exists():
        return
    if out.resolve() == source.resolve():
        raise UserError(f"{out} is the checkpoint itself: name another folder")
    if not overwrite:
        raise UserError(f"{out} is there already: --overwrite replaces it")
    if out.is_file():
        with out.open("rb") as file:
            ours = file.read(4) == b"GGUF"
    else:
        ours = is_quantized(out) or FIELD in config_in(out) or not any(out.iterdir())
    if not ours:
        raise UserError(f"{out} is no quantized checkpoint: remove it yourself, or name another")


@contextmanager
def replacing_checkpoint(out: Path) -> Iterator[Path]:
    """Yield where to write a folder or a file, which takes the place of `out` at the end, of
    whatever kind that is; see `replacing`."""
    out = out.resolve()  # rather what a link points at than the link
    with replacing(out) as new:
        yield new
        if out.is_dir():
            shutil.rmtree(out)
        elif new.is_dir():
            out.unlink(missing_ok=True)


def is_quantized(folder: Path) -> bool:
    """Return whether a checkpoint's config.json says so."""
    return "quantization_config" in config_in(folder)


def check_unquantized(folder: Path) -> None:
    """Check that a checkpoint is not quantized yet: its rounded values would pass for exact."""
    if is_quantized(folder):
        raise UserError(f"{folder} is quantized already: name the checkpoint that it was made from")


def config_in(folder: Path) -> dict[str, Any]:
    """Return a folder's config.json; empty where there is none that can be read."""
    try:
        config = json.loads((folder / "config.json").read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return config if isinstance(config, dict) else {}


def write_folder(
    contents: Contents, out: Path, entry: Mapping[str, Any], source: Path, card: str
) -> dict[str, int]:
    """Write a folder; return the bytes of each tensor, packed ones as `LAYER.weight`.

    Args:
        contents: of the checkpoint.
        out: the folder.
        entry: `quantization_config`; its format says how weights are stored.
        source: the folder of the tokenizer, the card and so on.
        card: the command that the model card names.
    """
    out.mkdir()
    tensors = dict(contents.rest)
    sizes = {name: tensor.nbytes for name, tensor in tensors.items()}
    for layer, weight in contents.weights.items():
        stored = int8_tensors(weight) if is_int8(entry) else stored_tensors(weight)
        tensors |= {f"{layer}.{part}": tensor.contiguous() for part, tensor in stored.items()}
        sizes[f"{layer}.weight"] = sum(tensor.nbytes for tensor in stored.values())
    try:
        save_torch_state_dict(tensors, out)
    except SafetensorError as error:
        raise OSError(f"{out.parent} cannot be written: {error}") from None
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.name not in NOT_COPIED:
                shutil.copy(file, out)
    config = {**contents.config, "quantization_config": dict(entry)}
    if not contents.weights:
        del config["quantization_config"]
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    readme = out / "README.md"
    old = readme.read_text(encoding="utf-8").rstrip() + "\n\n" if readme.exists() else ""
    readme.write_text(
        f"{old}## Quantized\n\n`{source.resolve().name}` with attnserve's {card}. What is said "
        "above of weights, sizes and results is of the original.\n",
        encoding="utf-8",
    )
    return sizes


def int8_tensors(weight: QuantizedWeight) -> dict[str, Tensor]:
    """Return a layer's tensors in the format `int-quantized`: 8 bits, symmetric, a scale a row."""
    signed = (weight.values.short() - weight.spec.midpoint).to(torch.int8)
    return {"weight": signed, "weight_scale": weight.scales}


def is_int8(entry: Mapping[str, Any]) -> bool:
    """Return whether weights are stored as signed bytes for vLLM's int8 kernel."""
    return entry["format"] == "int-quantized"


def quantization_config(
    weights: Mapping[str, QuantizedWeight], model: PreTrainedModel, int8: bool = False
) -> dict[str, Any]:
    """Return the entry of `config.json` for packed weights.

    Args:
        weights: by their layers' names.
        model: whose layers they are; a head that is tied to the embeddings has none of its own.
        int8: they are signed bytes, and inputs are rounded to 8 bits, with one scale a token.
    """
    targets: dict[str, tuple[list[str], dict[str, Any], str]] = {}
    tables = (EMBEDDINGS, HEAD)
    tied = EMBEDDINGS in weights and model.config.tie_word_embeddings
    alone = len({_way(x) for name, x in weights.items() if name not in tables}) == 1
    for name in sorted(weights, key=lambda name: name in tables):
        weight = weights[name]
        # Embeddings and head have a group of their own, and vLLM does not tell embeddings their
        # name.
        way = f"{name in tables} {_way(weight)}"
        known, *_ = targets.setdefault(way, ([], entry_of(weight), format_of(weight)))
        target = {EMBEDDINGS: "Embedding", HEAD: HEAD}.get(name, "Linear" if alone else name)
        known += [target] * (target not in known) + [HEAD] * (name == EMBEDDINGS and tied)
    quantized = {*weights, *([HEAD] if tied else [])}
    every = (name for name, module in model.named_modules() if isinstance(module, nn.Linear))
    ignore = [name for name in dict.fromkeys([*every, HEAD]) if name not in quantized]
    made = config_of(list(targets.values()), ignore)
    if int8:
        token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token"}
        made["format"] = made["config_groups"]["group_0"]["format"] = "int-quantized"
        made["config_groups"]["group_0"]["input_activations"] = token | {"dynamic": True}
    return made


def _way(weight: QuantizedWeight) -> str:
    """Return how a weight is stored: layers of one way are one group."""
    return f"{format_of(weight)} {entry_of(weight)}"
