"""Whole checkpoints in the formats of other libraries, written by their specifications.

That these are read as the libraries themselves read them is shown by `tests/quant_kernels/foreign`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

import hf_attn  # noqa: F401  registers the models of variants
from quant.contents import Contents
from quant.gguf_file import write_gguf
from quant.schemes.rtn import rtn
from quant_kernels.formats.awq import PLACES
from quant_kernels.formats.gguf import our_name, rope_rows
from quant_kernels.formats.packed import FORMAT, config_of, entry_of, stored_tensors
from quant_kernels.pack import pack
from quant_kernels.weight import QuantizedWeight, QuantSpec
from tests.tiny import tiny_checkpoint

Stored = dict[str, Tensor]
Entry = dict[str, Any]

NF4 = (
    *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
    *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
    *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
    *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
)


def write(
    source: Path,
    folder: Path,
    entry: Entry,
    store: Callable[[Tensor], tuple[Stored, Tensor]],
    more: Stored | None = None,
) -> PreTrainedModel:
    """Write a checkpoint whose linear layers, but the head, are quantized; return the model in
    float32 with the dequantized weights.

    Args:
        source: the unquantized checkpoint.
        folder: where to write.
        entry: what config.json says.
        store: from a weight to what is stored of it, and its dequantized values.
        more: tensors to add.
    """
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32)
    tensors = load_file(source / "model.safetensors")
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and name != "lm_head":
            weight = tensors.pop(f"{name}.weight").float()
            stored, dense = store(weight)
            tensors |= {f"{name}.{part}": tensor.contiguous() for part, tensor in stored.items()}
            module.weight.data = dense
    model.config.save_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": entry}))
    save_file(tensors | (more or {}), folder / "model.safetensors", metadata={"format": "pt"})
    for file in source.glob("tokenizer*"):
        (folder / file.name).write_bytes(file.read_bytes())
    return model


def regrouped(weight: Tensor, spec: QuantSpec, act_order: bool) -> QuantizedWeight:
    """Return a weight by round to nearest; with act order, in groups of columns far apart."""
    size, columns = spec.size(weight.shape[1]), weight.shape[1]
    if not act_order:
        return rtn(weight, spec)
    # Of layers with the same inputs GPTQ orders the columns alike.
    order = torch.randperm(columns, generator=torch.Generator().manual_seed(columns))
    g_idx = order // size
    order = torch.argsort(g_idx, stable=True)
    found = rtn(weight[:, order], spec)
    values = torch.empty_like(found.values)
    values[:, order] = found.values
    return QuantizedWeight(values, found.scales, found.zeros, spec, g_idx.int())


def write_gptq(source: Path, folder: Path, **settings: Any) -> PreTrainedModel:
    """Write GPTQ's format; settings: of `quantization_config`."""
    entry: Entry = {"quant_method": "gptq", "bits": 4, "group_size": 32, "sym": False}
    entry |= {"desc_act": False, **settings}
    bits, group_size = entry["bits"], entry["group_size"]
    spec = QuantSpec(bits, None if group_size == -1 else group_size)

    def store(weight: Tensor) -> tuple[Stored, Tensor]:
        found = regrouped(weight, spec, entry["desc_act"])
        zeros = found.zeros
        assert zeros is not None
        less_one = int(entry.get("checkpoint_format", "gptq") == "gptq")
        zeros = zeros.clamp(min=less_one)  # the first version has no 0
        columns = torch.arange(weight.shape[1])
        g_idx = columns // spec.size(len(columns)) if found.g_idx is None else found.g_idx
        found = QuantizedWeight(found.values, found.scales.half(), zeros, spec, found.g_idx)
        stored = {
            "qweight": pack(found.values, bits).T,
            "qzeros": pack((zeros - less_one).T.contiguous(), bits),
            "scales": found.scales.T,
            "g_idx": g_idx.int(),
        }
        return stored, found.dequantize()

    return write(source, folder, entry, store)


def write_awq(source: Path, folder: Path) -> PreTrainedModel:
    """Write AutoAWQ's format, groups of 32."""
    spec = QuantSpec(4, 32)

    def words(values: Tensor) -> Tensor:
        rows = torch.empty_like(values.T).view(values.shape[1], -1, 8)
        rows[:, :, PLACES] = values.T.reshape(values.shape[1], -1, 8)
        return pack(rows.flatten(1), 4)

    def store(weight: Tensor) -> tuple[Stored, Tensor]:
        found = rtn(weight, spec)
        found = QuantizedWeight(found.values, found.scales.half(), found.zeros, spec)
        assert found.zeros is not None
        stored = {"qweight": words(found.values), "qzeros": words(found.zeros)}
        return stored | {"scales": found.scales.T}, found.dequantize()

    entry = {"quant_method": "awq", "bits": 4, "group_size": 32, "zero_point": True}
    return write(source, folder, entry | {"version": "gemm"}, store)


def write_nf4(source: Path, folder: Path) -> PreTrainedModel:
    """Write bitsandbytes' NF4, blocks of 64."""
    table = torch.tensor(NF4)

    def store(weight: Tensor) -> tuple[Stored, Tensor]:
        blocks = weight.reshape(-1, 64)
        absmax = blocks.abs().amax(1)
        values = (blocks[..., None] / absmax[:, None, None] - table).abs().argmin(-1)
        flat = values.flatten().to(torch.uint8)
        state = {"blocksize": 64, "quant_type": "nf4", "dtype": "float32"}
        text = json.dumps(state | {"shape": list(weight.shape)}).encode()
        stored = {
            "weight": (flat[::2] << 4 | flat[1::2])[:, None],
            "weight.absmax": absmax,
            "weight.quant_map": table.clone(),
            "weight.quant_state.bitsandbytes__nf4": torch.tensor(list(text), dtype=torch.uint8),
        }
        return stored, (table[values] * absmax[:, None]).view(weight.shape)

    entry = {"quant_method": "bitsandbytes", "load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}
    return write(source, folder, entry, store)


def write_int8(source: Path, folder: Path) -> PreTrainedModel:
    """Write bitsandbytes' LLM.int8()."""

    def store(weight: Tensor) -> tuple[Stored, Tensor]:
        scb = weight.abs().amax(1)
        values = (weight * (127 / scb[:, None])).round().to(torch.int8)
        stored = {"weight": values, "SCB": scb, "weight_format": torch.tensor(0, dtype=torch.uint8)}
        return stored, values.float() * (scb[:, None] / 127)

    entry = {"quant_method": "bitsandbytes", "load_in_8bit": True}
    return write(source, folder, entry, store)


def write_compressed(source: Path, folder: Path, act_order: bool) -> PreTrainedModel:
    """Write compressed-tensors' packed format, groups of 32; with act order as llm-compressor's
    `actorder: group`."""
    spec, entries = QuantSpec(4, 32), list[Entry]()

    def store(weight: Tensor) -> tuple[Stored, Tensor]:
        found = regrouped(weight, spec, act_order)
        entries[:] = [entry_of(found)]
        return stored_tensors(found), found.dequantize()

    entry: Entry = {}
    model = write(source, folder, entry, store)
    config = json.loads((folder / "config.json").read_text())
    config["quantization_config"] = config_of([(["Linear"], entries[0], FORMAT)], ["lm_head"])
    (folder / "config.json").write_text(json.dumps(config))
    return model


def copy_gguf(source: Path, file: Path, settings: dict[str, Any]) -> None:
    """Write a GGUF file again with other settings; None: without one."""
    import gguf

    written, again = gguf.GGUFReader(source), gguf.GGUFWriter(file, "llama")
    add_settings(again, written, settings)
    for tensor in written.tensors:
        again.add_tensor(tensor.name, np.array(tensor.data), raw_dtype=tensor.tensor_type)
    again.write_header_to_file()
    again.write_kv_data_to_file()
    again.write_tensors_to_file()
    again.close()


def add_settings(writer: Any, source: Any, settings: dict[str, Any]) -> None:
    """Add the settings of a file, some of them others."""
    import gguf

    types = {int: gguf.GGUFValueType.UINT32, float: gguf.GGUFValueType.FLOAT32}
    for name, field in source.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        value, kind, sub = field.contents(), field.types[0], None
        if name in settings:
            value = settings[name]
            kind = types.get(type(value))
        elif kind == gguf.GGUFValueType.ARRAY:
            sub = field.types[-1]
        if kind is not None:
            writer.add_key_value(name, value, kind, sub)


MIXED = {"token_embd": "Q4_1", "attn_v": "Q6_K", "ffn_down": "Q5_K"}
"""Types of tensors in `write_mixed_gguf`; the others of a layer are Q4_K."""


def write_mixed_gguf(file: Path) -> PreTrainedModel:
    """Write a GGUF file of a Llama of two layers with random blocks; return the model in float32
    with the values that the package gguf reads."""
    import gguf

    folder = file.with_suffix(".source")
    shape = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64, "num_hidden_layers": 2}
    tiny_checkpoint(folder, "softmax", **shape, tie_word_embeddings=True)
    model: PreTrainedModel = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    stored = {k: x for k, x in model.state_dict().items() if k != "lm_head.weight"}
    write_gguf(Contents({}, {}, stored), model.config, folder / "tokenizer.json", file)
    random, heads = np.random.default_rng(0), {"attn_q": 4, "attn_k": 2}
    written = gguf.GGUFReader(file)
    again = gguf.GGUFWriter(file, "llama")
    add_settings(again, written, {})
    for tensor in written.tensors:
        layer = tensor.name.split(".")[-2]
        if "norm" in layer:
            again.add_tensor(tensor.name, np.array(tensor.data))
            continue
        type_ = gguf.GGMLQuantizationType[MIXED.get(layer, "Q4_K")]
        size, count = gguf.GGML_QUANT_SIZES[type_]
        rows, columns = tensor.data.shape
        blocks = random.integers(0, 256, (rows * columns // size, count), dtype=np.uint8)
        scale = np.frombuffer(np.float16(0.0005).tobytes(), np.uint8)
        for at in (208,) if type_.name == "Q6_K" else (0, 2):
            blocks[:, at : at + 2] = scale
        data = blocks.reshape(rows, -1)
        again.add_tensor(tensor.name, data, raw_dtype=type_)
        dense = torch.from_numpy(gguf.dequantize(data, type_).copy())
        ours = our_name(tensor.name)
        assert ours is not None
        order = rope_rows(rows, heads[layer]) if layer in heads else slice(None)
        stored[ours] = dense[order]
    again.write_header_to_file()
    again.write_kv_data_to_file()
    again.write_tensors_to_file()
    again.close()
    model.load_state_dict(stored, strict=False)
    return model
