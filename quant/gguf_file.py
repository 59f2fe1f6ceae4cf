"""GGUF files of Llama models: read into a checkpoint's contents, and written from them.

What blocks of values look like is in `quant_kernels.formats.gguf`; here are the names, the settings
and the tokenizer.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import pad

from attn_kernels import variant_from_config
from attnserve.errors import UserError
from quant.contents import Contents
from quant_kernels.formats import gguf as blocks
from quant_kernels.weight import QuantizedWeight, QuantSpec, TwoLevelWeight

LLAMA_3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPLITTERS = {
    ("ByteLevel",): "gpt-2",
    ("Digits", "ByteLevel"): "smollm",
    (LLAMA_3, "ByteLevel"): "llama-bpe",
}
"""llama.cpp's name of how tokenizer.json splits text before bytes are merged."""
NORMAL, CONTROL, ADDED, UNUSED = 1, 3, 4, 5
"""llama.cpp's types of tokens."""


def read_gguf(file: Path) -> Contents:
    """Return what a file holds.

    Raises:
        UserError: with one line: it is no Llama, or has what its config.json could not say.
    """
    from gguf import GGUFReader

    try:
        opened = GGUFReader(file)
    except (ValueError, IndexError, OSError) as error:
        raise UserError(f"{file} is no whole GGUF file ({error}): copy it again") from None
    settings = {name: field.contents() for name, field in opened.fields.items()}
    kind = settings.get("general.architecture")
    if kind != "llama" or settings.get("llama.expert_count"):
        raise UserError(f"{file} is a {kind}, or has experts: only Llamas are read from GGUF")
    scaled = settings.get("llama.rope.scaling.type", "none") != "none"
    named = {blocks.our_name(tensor.name): tensor for tensor in opened.tensors}
    if scaled or None in named:
        what = next((t.name for t in opened.tensors if not blocks.our_name(t.name)), "RoPE scaling")
        raise UserError(f"{file} has {what}, which is not read: convert the original checkpoint")
    config = config_from(settings, tied="lm_head.weight" not in named)
    heads = config["num_attention_heads"], config["num_key_value_heads"]
    weights: dict[str, QuantizedWeight] = {}
    rest: dict[str, Tensor] = {}
    for name, tensor in named.items():
        assert name is not None
        order = row_order(name, len(tensor.data), *heads)
        weight = blocks.read_blocks(tensor.data, tensor.tensor_type.name)
        if weight is None:
            rest[name] = dense_tensor(tensor)[order]
        else:
            weights[name.removesuffix(".weight")] = with_rows(weight, order)
    return Contents(config, weights, rest)


def row_order(name: str, rows: int, heads: int, kv_heads: int) -> Tensor:
    """Return for each row of a tensor here its row in GGUF, int64 `[rows]`: those of queries and
    keys are in another order."""
    for part, count in (("self_attn.q_proj", heads), ("self_attn.k_proj", kv_heads)):
        if part in name:
            return blocks.rope_rows(rows, count)
    return torch.arange(rows)


def dense_tensor(tensor: Any) -> Tensor:
    """Return a tensor's values: float16 or bfloat16 where these are stored, else float32."""
    from gguf.quants import dequantize

    kind = tensor.tensor_type.name
    if kind == "F16":
        return torch.from_numpy(tensor.data.copy())
    try:
        values = dequantize(tensor.data, tensor.tensor_type)
    except NotImplementedError:
        raise UserError(f"{tensor.name} is of the type {kind}, which is not read") from None
    dense = torch.from_numpy(np.array(values, np.float32))
    return dense.bfloat16() if kind == "BF16" else dense


def with_rows(weight: QuantizedWeight, order: Tensor) -> QuantizedWeight:
    """Return a weight with its rows in another order."""
    zeros = None if weight.zeros is None else weight.zeros[order]
    return QuantizedWeight(
        weight.values[order], weight.scales[order], zeros, weight.spec, weight.g_idx
    )


def config_from(settings: Mapping[str, Any], tied: bool) -> dict[str, Any]:
    """Return config.json of a file's settings.

    Raises:
        UserError: with one line: one is missing, or no number above 0.
    """

    def setting(name: str, kind: Any, default: Any = None) -> Any:
        found = settings.get(f"llama.{name}", default)
        if not isinstance(found, kind) or not 0 < found < math.inf:
            raise UserError(
                f"the GGUF file's setting llama.{name} is {found}, no number above 0: copy or "
                "convert it again"
            )
        return found

    tokens = settings.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise UserError("the GGUF file has no tokenizer: copy or convert it again")
    heads, hidden = setting("attention.head_count", int), setting("embedding_length", int)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "dtype": "float32",
        "hidden_size": hidden,
        "intermediate_size": setting("feed_forward_length", int),
        "num_hidden_layers": setting("block_count", int),
        "num_attention_heads": heads,
        "num_key_value_heads": setting("attention.head_count_kv", int, heads),
        "head_dim": setting("attention.key_length", int, hidden // heads),
        "max_position_embeddings": setting("context_length", int),
        "rms_norm_eps": setting("attention.layer_norm_rms_epsilon", float),
        "rope_parameters": {
            "rope_type": "default",
            "rope_theta": setting("rope.freq_base", float, 10000.0),
        },
        "tie_word_embeddings": tied,
        "vocab_size": setting("vocab_size", int, len(tokens)),
        "bos_token_id": settings.get("tokenizer.ggml.bos_token_id"),
        "eos_token_id": settings.get("tokenizer.ggml.eos_token_id"),
    }


def check_model(config: Any, tokenizer: Path) -> None:
    """Refuse a model that llama.cpp would run in another way.

    Args:
        config: as transformers reads it.
        tokenizer: tokenizer.json.

    Raises:
        UserError: with one line.
    """
    variant = variant_from_config(config)
    name = variant.name if variant else "softmax"
    for what, present in {
        f"{config.model_type} models: only Llamas": config.model_type
        not in ("llama", "variant_llama"),
        f"{name} attention: only softmax": name != "softmax",
        "a sliding window": bool(getattr(config, "sliding_window", None)),
        "biases": config.attention_bias or config.mlp_bias,
        "RoPE scaling": config.rope_parameters["rope_type"] != "default",
    }.items():
        if present:
            raise UserError(f"--format gguf does not write {what}")
    splitter_of(tokenizer, config.vocab_size)


def check_spec(spec: QuantSpec, scheme: str, config: Any) -> None:
    """Refuse before any work what no type of GGUF holds.

    Args:
        spec: of the layers.
        scheme: how they are quantized.
        config: as transformers reads it.

    Raises:
        UserError: with one line.
    """
    heads = config.num_attention_heads * config.head_dim
    columns = {config.hidden_size, heads, feed_forward_length(config)}
    found = [blocks.holding(spec, count) for count in sorted(columns)]
    found += ["zero points between quantized values have no place there"] * (scheme == "hqq")
    if why := next((line for line in found if line), None):
        raise UserError(f"--format gguf cannot hold these weights: {why}")


def feed_forward_length(config: Any) -> int:
    """Return the columns that MLPs have in a file: whole blocks."""
    return -(-config.intermediate_size // blocks.BLOCK) * blocks.BLOCK


def with_whole_blocks(contents: Contents, columns: int) -> Contents:
    """Return contents whose MLPs have so many columns. What is added is 0 and changes nothing:
    silu(0) * 0 is 0."""

    def added(layer: str, shape: Sequence[int]) -> tuple[int, int]:
        rows = columns - shape[0] if layer.endswith(("mlp.gate_proj", "mlp.up_proj")) else 0
        return rows, columns - shape[1] if layer.endswith("mlp.down_proj") else 0

    weights = {
        layer: with_zeros(weight, *added(layer, weight.values.shape))
        for layer, weight in contents.weights.items()
    }
    rest = {}
    for name, tensor in contents.rest.items():
        rows, more = added(name.removesuffix(".weight"), tensor.shape)
        rest[name] = pad(tensor, (0, more, 0, rows)) if rows or more else tensor
    return Contents(contents.config, weights, rest)


def with_zeros(weight: QuantizedWeight, rows: int, columns: int) -> QuantizedWeight:
    """Return a weight with rows more, and with columns more in its last group, all of them 0."""
    if not rows and not columns:
        return weight
    spec, zeros = weight.spec, weight.zeros
    zero = torch.full((len(weight.values), 1), spec.midpoint) if zeros is None else zeros[:, -1:]
    values = torch.cat((weight.values, zero.to(torch.uint8).expand(-1, columns)), 1)
    return QuantizedWeight(
        pad(values, (0, 0, 0, rows), value=spec.midpoint),
        pad(weight.scales, (0, 0, 0, rows), value=1),
        None if zeros is None else pad(zeros, (0, 0, 0, rows), value=spec.midpoint),
        spec,
        weight.g_idx,
    )


def splitter_of(tokenizer: Path, rows: int) -> str:
    """Return llama.cpp's name of how a tokenizer splits text.

    Args:
        tokenizer: tokenizer.json.
        rows: of the embedding table.

    Raises:
        UserError: with one line: it has none that is known here, or more tokens than rows.
    """
    if not tokenizer.is_file():
        raise UserError(f"{tokenizer} is not there, and a GGUF file has its tokenizer in it")
    try:
        content = json.loads(tokenizer.read_text(encoding="utf-8"))
        entry, kind = content["pre_tokenizer"] or {}, content["model"]["type"]
        steps = entry.get("pretokenizers", [entry])
        key = tuple(step.get("pattern", {}).get("Regex") or step.get("type", "") for step in steps)
        added = [token["id"] for token in content["added_tokens"]]
        last = max([*content["model"]["vocab"].values(), *added])
    except (ValueError, KeyError, TypeError, AttributeError):
        raise UserError(f"{tokenizer} is no whole tokenizer: copy it again") from None
    if kind != "BPE" or key not in SPLITTERS:
        raise UserError(
            f"{tokenizer} is of another kind than byte-level BPE as in GPT-2, SmolLM and Llama 3: "
            "--format gguf does not write it"
        )
    if last >= rows:
        raise UserError(f"{tokenizer} has token ids up to {last}, and the embeddings {rows} rows")
    return SPLITTERS[key]


def write_gguf(contents: Contents, config: Any, tokenizer: Path, file: Path) -> dict[str, int]:
    """Write a file that llama.cpp loads; return the bytes of each tensor, by its name here.

    Args:
        contents: of the model.
        config: as transformers reads it.
        tokenizer: tokenizer.json.
        file: what to write.

    Raises:
        UserError: with one line: no type of GGUF holds a layer's values.
    """
    from gguf import GGMLQuantizationType, GGUFWriter

    writer = GGUFWriter(file, "llama")
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    columns = feed_forward_length(config)
    contents = with_whole_blocks(contents, columns)
    writer.add_feed_forward_length(columns)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    add_tokenizer(writer, tokenizer, config)
    heads = config.num_attention_heads, config.num_key_value_heads
    sizes = {}
    for name, tensor in contents.rest.items():
        values = tensor[row_order(name, len(tensor), *heads).argsort()]
        if tensor.dim() == 1:
            values = values.float()  # llama.cpp wants norms so
        kind = {torch.bfloat16: "BF16", torch.float16: "F16"}.get(values.dtype, "F32")
        data = (values.view(torch.uint8) if kind == "BF16" else values).numpy()
        writer.add_tensor(blocks.their_name(name), data, raw_dtype=GGMLQuantizationType[kind])
        sizes[name] = data.nbytes
    for layer, weight in contents.weights.items():
        name = f"{layer}.weight"
        order = row_order(name, len(weight.values), *heads).argsort()
        if isinstance(weight, TwoLevelWeight):
            raise UserError(
                "--format gguf has no type for two-level scales: quantize the original with "
                "--scheme gptq --format gguf"
            )
        try:
            data, kind = blocks.write_blocks(with_rows(weight, order))
        except ValueError as error:
            raise UserError(f"{layer}: {error}") from None
        writer.add_tensor(blocks.their_name(name), data, raw_dtype=GGMLQuantizationType[kind])
        sizes[name] = data.nbytes
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return sizes


def add_tokenizer(writer: Any, file: Path, config: Any) -> None:
    """Add a byte-level BPE tokenizer to a file."""
    content = json.loads(file.read_text(encoding="utf-8"))
    tokens = [f"[unused {i}]" for i in range(config.vocab_size)]
    kinds = [UNUSED] * config.vocab_size
    for token, i in content["model"]["vocab"].items():
        tokens[i], kinds[i] = token, NORMAL
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        kinds[added["id"]] = CONTROL if added["special"] else ADDED
    merges = content["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(splitter_of(file, config.vocab_size))
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    for name in ("bos", "eos"):
        token_id = getattr(config, f"{name}_token_id")
        if isinstance(token_id, list):
            token_id = token_id[0]
        if token_id is not None:
            getattr(writer, f"add_{name}_token_id")(token_id)
    bos = config.bos_token_id
    post = json.dumps(content["post_processor"])
    writer.add_add_bos_token(bos in range(len(tokens)) and json.dumps(tokens[bos]) in post)
