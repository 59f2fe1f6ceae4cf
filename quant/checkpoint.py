"""Write a checkpoint with packed weights, in compressed-tensors' formats."""

import hashlib
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pandas as pd
import torch
from huggingface_hub import save_torch_state_dict
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedModel

from attnserve.errors import UserError
from attnserve.evaluation.checkpoint import read_config
from attnserve.evaluation.scorers import load
from attnserve.evaluation.texts import Text
from attnserve.files import replacing
from hf_attn.files import tensor_shapes, weight_files
from quant.config import sized
from quant.kept import Kept
from quant.model import HEAD, columns, empty_model, has_decoder_layers, linears, quantize
from quant.options import AUTO
from quant.schemes.registry import SERVED, get_scheme
from quant.schemes.rtn import rtn
from quant_kernels.pack import pack
from quant_kernels.weight import QuantizedWeight, QuantSpec, TwoLevelWeight

CHUNK = 32  # group sizes are multiples of it, so that a group starts with a 32-bit word at all bits
COPIED = ("*.json", "*.txt", "*.md", "*.model", "*.jinja", "*.py", "LICENSE*")
"""Tokenizer, generation settings, card, code that `auto_map` names."""
TABLES = ("model.embed_tokens", HEAD)
PARTS = ["linear", "embeddings", "rest"]
LARGEST = 1e38
"""Weight: the distance of two of them, which is what a scale is made of, is below 2^128."""


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is quantized."""

    # bits, scheme, group_size, symmetric, act_order, search: of linear layers, as in `QuantConfig`;
    # the two last are of gptq, and others leave them out.
    bits: int
    scheme: str
    group_size: int | None = AUTO
    symmetric: bool = False
    act_order: bool = False
    search: bool = False
    # Bits of the token embeddings and the head; None: they stay as they are.
    embeddings: int | None = None
    activations: bool = False  # vLLM rounds the inputs of linear layers to 8 bits
    # Of all linear layers together; each then has bits of its own (`quant.budget`), and `bits` are
    # the nearest. None: `bits` everywhere.
    bits_per_weight: float | None = None

    def __post_init__(self) -> None:
        scheme = get_scheme(self.scheme)
        if self.scheme not in SERVED:
            raise UserError(
                f"scheme {self.scheme} cannot be served: use one of {', '.join(SERVED)}"
            )
        if not scheme.two_level and self.group_size is not None and self.group_size % CHUNK:
            raise UserError(
                f"--group-size {self.group_size}: use a multiple of {CHUNK}, or channel"
            )
        if self.bits_per_weight is not None and not self.calibrated:
            raise UserError("--bits-per-weight needs a calibrated scheme: two-level or gptq")
        if self.bits_per_weight is not None and self.symmetric:
            raise UserError("--bits-per-weight: leave out --symmetric")
        int8 = self.bits == 8 and self.symmetric and self.group_size is None
        if self.activations and (not int8 or self.embeddings is not None):
            raise UserError(
                "--activations needs --bits 8 --symmetric --group-size channel and no "
                "--embeddings: vLLM's int8 kernel takes nothing else"
            )

    @property
    def spec(self) -> QuantSpec:
        """How linear layers are quantized."""
        scheme = get_scheme(self.scheme)
        return QuantSpec(self.bits, sized(self.group_size, scheme, self.bits), self.symmetric)

    @property
    def table_spec(self) -> QuantSpec:
        """How embeddings and head are quantized, by round to nearest."""
        assert self.embeddings is not None
        size = AUTO if get_scheme(self.scheme).two_level else self.group_size
        size = sized(size, get_scheme("rtn"), self.embeddings)
        return QuantSpec(self.embeddings, size, self.symmetric)

    @property
    def options(self) -> dict[str, bool]:
        """What schemes are told besides the spec."""
        return {"act_order": self.act_order, "search": self.search}

    @property
    def calibrated(self) -> bool:
        """Whether it needs text."""
        return get_scheme(self.scheme).calibrated

    def __str__(self) -> str:
        """Return the options of `python -m quant.quantize`."""
        parts = [f"--bits {self.bits}", f"--scheme {self.scheme}"]
        size: int | str | None = self.spec.group_size
        if self.bits_per_weight is not None:
            parts[0] = f"--bits-per-weight {self.bits_per_weight:g}"
            size = "auto" if self.group_size == AUTO else size
        parts.append(f"--group-size {size or 'channel'}")
        if get_scheme(self.scheme).has_options:
            parts.append("--act-order" if self.act_order else "--no-act-order")
            parts.append("--search" if self.search else "--no-search")
        parts += [f"--{flag}" for flag in ("symmetric", "activations") if getattr(self, flag)]
        parts += [f"--embeddings {self.embeddings}"] * (self.embeddings is not None)
        return " ".join(parts)


def check_folders(folder: Path, out: Path, overwrite: bool) -> None:
    """Check that a checkpoint can be quantized and its new folder be written, and that nothing is
    overwritten that was not asked to be, or was not made here."""
    read_config(folder)
    if _is_quantized(folder):
        raise UserError(f"{folder} is quantized already: name the checkpoint that it was made from")
    if not weight_files(folder):
        raise UserError(f"{folder} has no *.safetensors: save the checkpoint in that format first")
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"{out} cannot be written, since {above} cannot: name another folder")
    if not out.exists():
        return
    if out.resolve() == folder.resolve():
        raise UserError(f"{out} is the checkpoint itself: name another folder")
    if not overwrite:
        raise UserError(f"{out} is there already: --overwrite replaces it")
    if not (out.is_dir() and (_is_quantized(out) or not any(out.iterdir()))):
        raise UserError(f"{out} is no quantized checkpoint: remove it yourself, or name another")


def _is_quantized(folder: Path) -> bool:
    config = folder / "config.json"
    return config.exists() and "quantization_config" in json.loads(config.read_text("utf-8"))


def check_layers(folder: Path, recipe: Recipe) -> None:
    """Check before any work that a recipe can be applied to a checkpoint, and that it has the
    tensors of its model, with numbers in them."""
    model = empty_model(folder)
    if not linears(model) or (recipe.calibrated and not has_decoder_layers(model)):
        raise UserError(
            f"{folder} is a {model.config.model_type}, whose layers {recipe.scheme} cannot "
            "quantize: use a model like Llama"
        )
    get_scheme(recipe.scheme).check(recipe.spec, columns(model))
    stored = tensor_shapes(folder)
    for name, parameter in model.named_parameters():
        if name not in stored:
            raise UserError(
                f"{folder} has no tensor {name}: it is incomplete, or its names are not those of "
                "transformers' Llama, which are all that can be quantized yet"
            )
        if stored[name] != parameter.shape:
            raise UserError(
                f"{name} of {folder} is {list(stored[name])}, and config.json asks for "
                f"{list(parameter.shape)}: it describes another model"
            )
    check_values(folder)


def check_values(folder: Path) -> None:
    """Check that every weight is a number, and that differences of two of them are, in float32."""
    for file in weight_files(folder):
        with safe_open(file, framework="pt") as opened:
            for name in opened.keys():  # noqa: SIM118  no mapping
                tensor = opened.get_tensor(name)
                if not tensor.is_floating_point() or not tensor.numel():
                    continue
                largest = float((tensor.float() if tensor.itemsize == 1 else tensor).abs().max())
                if not largest <= LARGEST:  # NaN is not, either
                    raise UserError(
                        f"{name} in {file} has a weight of {largest:g}: only numbers up to "
                        f"{LARGEST:g} can be quantized; copy or train the checkpoint again"
                    )


def tables_of(model: PreTrainedModel, recipe: Recipe) -> Sequence[str]:
    """Return the names of embeddings and head, if they are quantized; tied ones are one."""
    if recipe.embeddings is None:
        return ()
    return TABLES[:1] if model.config.tie_word_embeddings else TABLES


def quantize_checkpoint(
    folder: Path,
    out: Path,
    recipe: Recipe,
    calibration: Text | None,
    card: str,
    specs: Mapping[str, QuantSpec] = MappingProxyType({}),
) -> tuple[PreTrainedModel, pd.DataFrame]:
    """Quantize a checkpoint and write it; the new folder replaces `out` when it is complete. What
    a killed run has quantized is beside `out`, and the next run goes on there.

    Args:
        folder, out, recipe: from where, to where, and how.
        calibration: text that a calibrated scheme is calibrated on.
        card: what the model card says of how it was made.
        specs: of linear layers by name that are not quantized as the recipe says.

    Returns:
        The model in float32 with dequantized weights, and the sizes that `write_checkpoint` gives.
    """
    model = load(folder)
    tables, scheme = tables_of(model, recipe), get_scheme(recipe.scheme)
    texts = torch.empty(0, dtype=torch.long) if calibration is None else calibration.rows
    stats = [(file.name, file.stat()) for file in (folder / "config.json", *weight_files(folder))]
    key = {
        "recipe": str(recipe),
        "checkpoint": [[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats],
        "texts": hashlib.sha256(texts.numpy().tobytes()).hexdigest(),
        "specs": {name: str(spec) for name, spec in specs.items()},
    }
    kept = Kept(out.with_name(f".{out.name}.quantized"), key)
    try:
        with tqdm(total=len(tables) + len(linears(model)), unit="layer") as bar:
            for name in tables:  # first, so that calibrated schemes see them
                weight = model.get_submodule(name).weight
                if name not in kept:
                    kept[name] = rtn(weight.data, recipe.table_spec)
                weight.data = kept[name].dequantize()  # a tied head's too
                bar.update()
            quantize(
                model,
                scheme,
                recipe.spec,
                texts,
                options=recipe.options,
                on_layer=bar.update,
                quantized=kept,
                specs=specs,
            )
        with replacing(out) as new:
            sizes = write_checkpoint(folder, new, kept, recipe.activations, card)
            if out.exists():
                shutil.rmtree(out)
    except ValueError:  # what the next run would refuse, too
        kept.remove()
        raise
    kept.remove()
    return model, sizes


def write_checkpoint(
    source: Path, out: Path, quantized: Mapping[str, QuantizedWeight], int8: bool, card: str
) -> pd.DataFrame:
    """Write a folder like `source` with quantized weights packed, or as signed bytes for vLLM's
    int8 kernel.

    Returns:
        How many numbers linear layers, embeddings, the rest and all of it have, and their bytes
        before and after: a row each.
    """
    out.mkdir()
    rows: list[tuple[str, int, int, int]] = []
    tensors: dict[str, Tensor] = {}
    for file in weight_files(source):
        for name, tensor in load_file(file).items():
            layer = name.removesuffix(".weight")
            new, part = {name: tensor}, "rest"
            if layer in quantized:
                stored = stored_tensors(quantized[layer], int8)
                new = {f"{layer}.{key}": value for key, value in stored.items()}
                part = "embeddings" if layer in TABLES else "linear"
            after = sum(value.nbytes for value in new.values())
            rows.append((part, tensor.numel(), tensor.nbytes, after))
            tensors |= new
    try:
        save_torch_state_dict(tensors, out)
    except SafetensorError as error:
        raise UserError(f"{out.parent} cannot be written: {error}") from None
    sizes = pd.DataFrame(rows, columns=["part", "numbers", "before", "after"])
    sizes = sizes.groupby("part").sum().reindex(PARTS).dropna().astype(int)
    sizes.loc["all"] = sizes.sum()
    for pattern in COPIED:
        for file in source.glob(pattern):
            if file.name not in ("config.json", "model.safetensors.index.json"):
                shutil.copy(file, out)
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    config["quantization_config"] = quantization_config(quantized, int8)
    (out / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    readme = out / "README.md"
    old = readme.read_text(encoding="utf-8").rstrip() + "\n\n" if readme.exists() else ""
    readme.write_text(
        f"{old}## Quantized\n\n`{source.resolve().name}` with attnserve's {card}. What is said "
        "above of weights, sizes and results is of the original.\n",
        encoding="utf-8",
    )
    return sizes


def stored_tensors(weight: QuantizedWeight, int8: bool) -> dict[str, Tensor]:
    """Return a layer's tensors by name, in the format `int-quantized` (8 bits, symmetric, a
    scale for each row), `pack-quantized` or `two-level`."""
    bits, zeros = weight.spec.bits, weight.zeros
    if int8:
        signed = (weight.values.short() - weight.spec.midpoint).to(torch.int8)
        return {"weight": signed, "weight_scale": weight.scales}
    tensors = {
        "weight_packed": pack(weight.values, bits),
        "weight_scale": weight.scales,
        "weight_shape": torch.tensor(weight.values.shape),
    }
    if isinstance(weight, TwoLevelWeight):
        tensors["weight_levels"] = weight.levels
    if zeros is not None:
        is_packed = zeros.dtype == torch.uint8
        tensors["weight_zero_point"] = pack(zeros.T.contiguous(), bits).T if is_packed else zeros
    return tensors


def quantization_config(quantized: Mapping[str, QuantizedWeight], int8: bool) -> dict[str, Any]:
    """Return the entry of `config.json`, in compressed-tensors' words: a group for each way in
    which layers are quantized. Two-level scales are no format of that library: what has them is
    `attnserve`'s, so that nobody else takes it for what he knows."""
    ways: dict[str, tuple[QuantizedWeight, list[str]]] = {}
    for layer, weight in quantized.items():
        way = f"{layer in TABLES} {_weights_entry(weight)} {_format(weight, int8)}"
        ways.setdefault(way, (weight, []))[1].append(layer)
    linear_ways = sum(names[0] not in TABLES for _, names in ways.values())
    token = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "token", "dynamic": True}
    groups: dict[str, dict[str, Any]] = {}
    for weight, names in sorted(ways.values(), key=lambda way: way[1][0] in TABLES):
        targets = names if linear_ways > 1 else ["Linear"]
        if names[0] in TABLES:
            # vLLM does not tell embeddings their name. A tied head has no tensors of its own.
            targets = ["Embedding", HEAD]
        groups[f"group_{len(groups)}"] = {
            "targets": targets,
            "weights": _weights_entry(weight),
            "input_activations": token if int8 else None,
            "output_activations": None,
            "format": _format(weight, int8),
        }
    formats = {group["format"] for group in groups.values()}
    return {
        "quant_method": "attnserve" if "two-level" in formats else "compressed-tensors",
        "format": groups["group_0"]["format"],
        "quantization_status": "compressed",
        "config_groups": groups,
        "ignore": [] if any(name in TABLES for name in quantized) else [HEAD],
        "kv_cache_scheme": None,
    }


def _format(weight: QuantizedWeight, int8: bool) -> str:
    if isinstance(weight, TwoLevelWeight):
        return "two-level"
    return "int-quantized" if int8 else "pack-quantized"


def _weights_entry(weight: QuantizedWeight) -> dict[str, Any]:
    spec = weight.spec
    entry: dict[str, Any] = {
        "num_bits": spec.bits,
        "type": "int",
        "symmetric": spec.symmetric,
        "strategy": "channel" if spec.group_size is None else "group",
        "group_size": spec.group_size,
        "dynamic": False,
    }
    if weight.zeros is not None and weight.zeros.dtype != torch.uint8:
        entry["zp_dtype"] = str(weight.zeros.dtype)
    return entry
