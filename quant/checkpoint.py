"""Write a checkpoint with packed weights, in compressed-tensors' formats."""

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import pandas as pd
import torch
from safetensors.torch import load_file
from tqdm import tqdm
from transformers import PreTrainedModel

from attn_kernels.kv_quant import FIELD, KV_FORMATS
from attnserve.errors import UserError
from attnserve.evaluation.checkpoint import read_config
from attnserve.evaluation.scorers import load
from attnserve.evaluation.texts import Text
from hf_attn.files import tensor_shapes, weight_files
from quant.checks import check_no_experts, check_tensors, check_values
from quant.config import sized
from quant.contents import EMBEDDINGS, Contents
from quant.gguf_file import check_model, check_spec, write_gguf
from quant.kept import Kept
from quant.model import HEAD, columns, empty_model, has_decoder_layers, linears, quantize
from quant.options import AUTO
from quant.schemes.registry import SERVED, get_scheme
from quant.schemes.rtn import rtn
from quant.write import (
    TOKENIZER,
    check_out,
    check_unquantized,
    quantization_config,
    replacing_checkpoint,
    write_folder,
)
from quant_kernels.formats.packed import FORMAT as PACKED
from quant_kernels.weight import QuantizedWeight, QuantSpec

CHUNK = 32  # group sizes are multiples of it, so that a group starts with a 32-bit word at all bits
TABLES = (EMBEDDINGS, HEAD)
PARTS = ["linear", "embeddings", "rest"]
GGUF = "gguf"
FORMATS = (PACKED, GGUF)


@dataclass(frozen=True)
class Recipe:
    """How a checkpoint is quantized."""

    # bits, scheme, group_size, symmetric, act_order, search: of linear layers, as in `QuantConfig`;
    # the two last are of gptq, and others leave them out. No bits: linear layers stay as they are.
    bits: int | None
    scheme: str
    group_size: int | None = AUTO
    symmetric: bool = False
    act_order: bool = False
    search: bool = False
    # Bits of the token embeddings and the head; None: they stay as they are.
    embeddings: int | None = None
    activations: bool = False  # vLLM rounds the inputs of linear layers to 8 bits
    format: str = PACKED  # of what is written
    # Of all linear layers together; each then has bits of its own (`quant.budget`), and `bits` are
    # the nearest. None: `bits` everywhere.
    bits_per_weight: float | None = None
    kv_cache_dtype: str | None = None  # of keys and values, where the server is told none

    def __post_init__(self) -> None:
        scheme = get_scheme(self.scheme)
        if self.kv_cache_dtype not in (None, *KV_FORMATS):
            raise UserError(
                f"--kv-cache-dtype {self.kv_cache_dtype}: use {' or '.join(KV_FORMATS)}"
            )
        if self.kv_cache_dtype is not None and self.format == GGUF:
            raise UserError("--kv-cache-dtype is vLLM's: leave out --format gguf")
        if self.scheme not in SERVED:
            raise UserError(
                f"scheme {self.scheme} cannot be served: use one of {', '.join(SERVED)}"
            )
        if self.format not in FORMATS:
            raise UserError(f"--format {self.format}: use {' or '.join(FORMATS)}")
        if self.activations and self.format == GGUF:
            raise UserError("--activations is vLLM's: leave out --format gguf")
        if scheme.two_level and self.format == GGUF:
            raise UserError(
                f"--format gguf has no type for the scheme {self.scheme}: use --scheme gptq"
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
        """How linear layers are quantized, if they are."""
        assert self.bits is not None
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
        return self.bits is not None and get_scheme(self.scheme).calibrated

    def __str__(self) -> str:
        """Return the options of `python -m quant.quantize`."""
        parts = []
        if self.bits is not None:
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
        parts += [f"--format {self.format}"] * (self.format != PACKED)
        parts += [f"--kv-cache-dtype {self.kv_cache_dtype}"] * (self.kv_cache_dtype is not None)
        return " ".join(parts)


def check_folders(folder: Path, out: Path, overwrite: bool) -> None:
    """Check that a checkpoint can be quantized and its new folder be written, and that nothing is
    overwritten that was not asked to be, or was not made here."""
    read_config(folder)
    check_unquantized(folder)
    if not weight_files(folder):
        raise UserError(f"{folder} has no *.safetensors: save the checkpoint in that format first")
    check_out(folder, out, overwrite)


def check_layers(folder: Path, recipe: Recipe) -> None:
    """Check before any work that a recipe can be applied to a checkpoint, and that it has the
    tensors of its model, with numbers in them."""
    model = empty_model(folder)
    if not linears(model) or (recipe.calibrated and not has_decoder_layers(model)):
        raise UserError(
            f"{folder} is a {model.config.model_type}, whose layers {recipe.scheme} cannot "
            "quantize: use a model like Llama"
        )
    check_no_experts(folder, model)
    check_tensors(folder, model, tensor_shapes(folder))
    if recipe.bits is not None:
        get_scheme(recipe.scheme).check(recipe.spec, columns(model))
    if recipe.kv_cache_dtype is not None:
        check_cache(folder, recipe.kv_cache_dtype)
    if recipe.format == GGUF:
        check_model(model.config, folder / TOKENIZER)
        specs = [] if recipe.bits is None else [recipe.spec]
        specs += [] if recipe.embeddings is None else [recipe.table_spec]
        for spec in specs:
            check_spec(spec, recipe.scheme, model.config)
    check_values(folder, model)


def check_cache(folder: Path, dtype: str) -> None:
    """Check that a checkpoint's keys and values can be served like this."""
    config = read_config(folder)
    KV_FORMATS[dtype].vector_bytes(
        config.head_dim or config.hidden_size // config.num_attention_heads
    )
    variant = getattr(config, "attention_variant", None) or {}
    if variant.get("kv_budgets"):
        raise UserError(
            f"{folder} has kv_budgets, which do not go with --kv-cache-dtype: leave out one of them"
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
    with closing(Kept(out.with_name(f".{out.name}.quantized"), key)) as kept:
        try:
            layers = [] if recipe.bits is None else linears(model)
            with tqdm(total=len(tables) + len(layers), unit="layer", disable=None) as bar:
                for name in tables:  # first, so that calibrated schemes see them
                    weight = model.get_submodule(name).weight
                    if name not in kept:
                        kept[name] = rtn(weight.data, recipe.table_spec)
                    weight.data = kept[name].dequantize()  # a tied head's too
                    bar.update()
                if recipe.bits is not None:
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
            with replacing_checkpoint(out) as new:
                sizes = write_checkpoint(folder, new, kept, model, recipe, card)
        except ValueError:  # what the next run would refuse, too
            kept.remove()
            raise
        kept.remove()
    return model, sizes


def write_checkpoint(
    source: Path,
    out: Path,
    quantized: Mapping[str, QuantizedWeight],
    model: PreTrainedModel,
    recipe: Recipe,
    card: str,
) -> pd.DataFrame:
    """Write what is in `source` with these weights quantized.

    Returns:
        How many numbers linear layers, embeddings, the rest and all of it have, and their bytes
        before and after: a row each.
    """
    stored = {name: x for file in weight_files(source) for name, x in load_file(file).items()}
    rest = {n: x for n, x in stored.items() if n.removesuffix(".weight") not in quantized}
    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    if recipe.kv_cache_dtype is not None:
        config[FIELD] = recipe.kv_cache_dtype
    # In the model's order, whatever order a run that goes on has found them in.
    weights = {name: quantized[name] for name, _ in model.named_modules() if name in quantized}
    contents = Contents(config, weights, rest)
    if recipe.format == GGUF:
        after = write_gguf(contents, model.config, source / TOKENIZER, out)
    else:
        entry = quantization_config(quantized, model, recipe.activations)
        after = write_folder(contents, out, entry, source, card)
    rows = []
    for name, tensor in stored.items():
        layer = name.removesuffix(".weight")
        part = "rest" if name in rest else "embeddings" if layer in TABLES else "linear"
        rows.append((part, tensor.numel(), tensor.nbytes, after[name]))
    sizes = pd.DataFrame(rows, columns=["part", "numbers", "before", "after"])
    sizes = sizes.groupby("part").sum().reindex(PARTS).dropna().astype(int)
    sizes.loc["all"] = sizes.sum()
    return sizes
