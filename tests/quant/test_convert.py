"""From other programs' quantized formats to the one that is served, and to GGUF and back: the same
values, or one line."""

from __future__ import annotations

import functools
import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, PreTrainedModel

from quant.convert import convert as command
from quant.quantize import quantize
from tests import foreign
from tests.conftest import Commands
from tests.tiny import tiny_checkpoint

FORMATS: dict[str, Callable[[Path, Path], PreTrainedModel]] = {
    "gptq": foreign.write_gptq,
    "gptq act order": functools.partial(foreign.write_gptq, desc_act=True, bits=3),
    "gptq channel": functools.partial(foreign.write_gptq, group_size=-1, bits=8),
    "awq": foreign.write_awq,
    "nf4": foreign.write_nf4,
    "int8": foreign.write_int8,
    "compressed-tensors act order": functools.partial(foreign.write_compressed, act_order=True),
}


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose columns GGUF's blocks divide."""
    folder = tmp_path_factory.mktemp("source")
    fields = {"intermediate_size": 192, "num_hidden_layers": 2, "max_position_embeddings": 128}
    return tiny_checkpoint(folder, "softmax", **fields)


def logits(model: PreTrainedModel) -> Tensor:
    """Return those of a sequence."""
    with torch.inference_mode():
        return model(input_ids=torch.arange(3, 60)[None]).logits


def loaded(folder: Path) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


@pytest.mark.parametrize("name", FORMATS)
def test_formats_of_others(name: str, source: Path, tmp_path: Path, commands: Commands) -> None:
    """Served from then on as ours, and loaded by transformers."""
    expected = FORMATS[name](source, tmp_path / "theirs")
    out = tmp_path / "out"
    said = json.loads(commands.run(command, tmp_path / "theirs", out, "--json"))
    layers = (0, 14) if name == "nf4" else (14, 0)
    assert (said["packed"], said["dequantized"]) == layers
    assert torch.equal(logits(loaded(out)), logits(expected))
    config = json.loads((out / "config.json").read_text())
    assert ("quantization_config" in config) == (name != "nf4")
    assert (out / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_to_gguf_and_back(source: Path, tmp_path: Path, commands: Commands) -> None:
    """From AWQ, whose values need five bits; llama.cpp's file says all that config.json does."""
    expected = logits(foreign.write_awq(source, tmp_path / "theirs"))
    file, back = tmp_path / "model.gguf", tmp_path / "back"
    commands.run(command, tmp_path / "theirs", file, "--format=gguf")
    assert "14 layers as they are, 0 dequantized" in commands.run(command, file, back)
    # What float32 holds of a number in a GGUF file, rms_norm_eps say, is rounded.
    assert (logits(loaded(back)) - expected).abs().max() < 1e-4 * expected.std()
    before, after = (AutoTokenizer.from_pretrained(folder) for folder in (source, back))
    text = "The licence, 12345 of   this work;\n\n don't\tdo"
    assert before.encode(text) == after.encode(text)


QUANTIZED = [
    (["--bits=4", "--group=32", "--symmetric", "--embeddings=8"], {"Q4_0", "Q8_0"}),
    (["--bits=4"], {"Q5_0"}),
    (["--bits=3", "--group=channel", "--embeddings=4"], {"Q4_0", "Q5_0"}),
    (["--bits=7"], {"Q8_0"}),
]


@pytest.mark.parametrize(("options", "kinds"), QUANTIZED)
@pytest.mark.parametrize(("tied", "columns"), [(True, 192), (False, 176)])
def test_quantize_writes_gguf(
    tied: bool,
    columns: int,
    options: list[str],
    kinds: set[str],
    tmp_path: Path,
    commands: Commands,
) -> None:
    """Every tensor, as the package gguf reads it, is that of the packed checkpoint; 176 columns are
    no whole blocks, and end in zeros."""
    gguf = pytest.importorskip("gguf")
    fields = {"intermediate_size": columns, "num_hidden_layers": 1, "tie_word_embeddings": tied}
    source = tiny_checkpoint(tmp_path / "source", "softmax", **fields)
    file, out = tmp_path / "model.gguf", tmp_path / "out"
    given = ["--scheme=rtn", *options]
    parts = json.loads(commands.run(quantize, source, file, *given, "--format=gguf", "--json"))
    commands.run(quantize, source, out, *given)
    weights = dict(loaded(out).named_parameters())
    reader = gguf.GGUFReader(file)
    assert kinds == {t.tensor_type.name for t in reader.tensors} - {"F32"}
    assert parts["parts"]["all"]["after"] == sum(int(t.n_bytes) for t in reader.tensors)
    found = {
        t.name: torch.from_numpy(gguf.dequantize(t.data, t.tensor_type)) for t in reader.tensors
    }
    assert len(found) == len(weights) and ("output.weight" in found) == (not tied)
    rows = weights["model.layers.0.self_attn.k_proj.weight"].unflatten(0, (2, 2, 16))
    assert torch.equal(found["blk.0.attn_k.weight"], rows.transpose(1, 2).flatten(0, 2))
    for theirs, ours, ends in (
        ("token_embd", "model.embed_tokens", ()),
        ("blk.0.ffn_down", "model.layers.0.mlp.down_proj", (0, 192 - columns)),
        ("blk.0.ffn_gate", "model.layers.0.mlp.gate_proj", (0, 0, 0, 192 - columns)),
        ("blk.0.ffn_up", "model.layers.0.mlp.up_proj", (0, 0, 0, 192 - columns)),
        ("blk.0.attn_norm", "model.layers.0.input_layernorm", ()),
    ):
        assert torch.equal(found[f"{theirs}.weight"], pad(weights[f"{ours}.weight"], ends))


@pytest.mark.parametrize("options", [options for options, _ in QUANTIZED])
@pytest.mark.parametrize("columns", [192, 176])
def test_llama_cpp_loads_them(
    columns: int, options: list[str], tmp_path: Path, commands: Commands
) -> None:
    """It rounds the inputs of each layer to 8 bits, and is as far off as that makes it."""
    llama_cpp = pytest.importorskip("llama_cpp")
    fields = {"intermediate_size": columns, "num_hidden_layers": 2, "max_position_embeddings": 128}
    source = tiny_checkpoint(tmp_path / "source", "softmax", **fields)
    file, out = tmp_path / "model.gguf", tmp_path / "out"
    commands.run(quantize, source, file, "--scheme=rtn", *options, "--format=gguf")
    commands.run(quantize, source, out, "--scheme=rtn", *options)
    expected = logits(loaded(out))[0]
    model = llama_cpp.Llama(str(file), n_ctx=64, logits_all=True, verbose=False, n_threads=1)
    model.eval(list(range(3, 60)))
    difference = torch.from_numpy(np.array(model.scores[:57])) - expected
    assert difference.pow(2).mean().sqrt() < 0.1 * expected.std()


def test_tables_to_gguf(source: Path, tmp_path: Path, commands: Commands) -> None:
    """NF4 is written dequantized."""
    expected = logits(foreign.write_nf4(source, tmp_path / "theirs"))
    file, back = tmp_path / "model.gguf", tmp_path / "back"
    said = commands.run(command, tmp_path / "theirs", file, "--format=gguf")
    assert "0 layers as they are, 14 dequantized" in said
    assert "0 layers as they are, 0 dequantized" in commands.run(command, file, back)
    assert (logits(loaded(back)) - expected).abs().max() < 1e-4 * expected.std()


def test_two_level_scales_to_gguf(source: Path, tmp_path: Path, commands: Commands) -> None:
    """No type has them; dequantized they would be nothing but larger."""
    given = ["--bits=3", "--calibration=2", "--length=32"]
    commands.run(quantize, source, tmp_path / "ours", *given)
    line = commands.refused(command, tmp_path / "ours", tmp_path / "out", "--format=gguf")
    assert "has no type for two-level scales: quantize the original with --scheme gptq" in line
    assert {path.name for path in tmp_path.iterdir()} == {"ours"}


def test_types_that_are_mixed(tmp_path: Path, commands: Commands) -> None:
    """As in llama.cpp's Q4_K_M: what vLLM computes as one is packed if all of it can be."""
    expected = logits(foreign.write_mixed_gguf(tmp_path / "mixed.gguf"))
    said = commands.run(command, tmp_path / "mixed.gguf", tmp_path / "out")
    # Dequantized are q, k and v, since v has blocks of 16 columns; packed o, gate, up, down and
    # the embeddings.
    assert "9 layers as they are, 4 dequantized" in said
    assert (logits(loaded(tmp_path / "out")) - expected).abs().max() < 1e-4 * expected.std()


def changed(config: dict[str, Any]) -> Callable[[Path], object]:
    """Return what changes the `quantization_config` of a folder."""

    def change(folder: Path) -> None:
        content = json.loads((folder / "config.json").read_text())
        content["quantization_config"] |= config
        (folder / "config.json").write_text(json.dumps(content))

    return change


def without(part: str) -> Callable[[Path], object]:
    """Return what takes a tensor from a folder."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[f"model.layers.1.mlp.up_proj.{part}"]
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


REFUSED: list[tuple[Callable[[Path], object], str]] = [
    (changed({"bits": 6}), "GPTQ with 6 bits in the format gptq cannot be read"),
    (changed({"quant_method": "exl3"}), "has the format exl3, which cannot be converted"),
    (without("qzeros"), "has no tensor model.layers.1.mlp.up_proj.qzeros: it is incomplete"),
    (changed({"group_size": 64}), "down_proj cannot be read (*has scales [128, 3], not [128, 6]"),
]


@pytest.mark.parametrize(("change", "says"), REFUSED)
def test_broken_checkpoints_of_others(
    change: Callable[[Path], object], says: str, source: Path, tmp_path: Path, commands: Commands
) -> None:
    foreign.write_gptq(source, tmp_path / "theirs")
    change(tmp_path / "theirs")
    line = commands.refused(command, tmp_path / "theirs", tmp_path / "out")
    start, _, end = says.partition("*")
    assert start in line and end in line, line
    assert {path.name for path in tmp_path.iterdir()} == {"theirs"}


SETTINGS: list[tuple[str, object, str]] = [
    ("llama.attention.head_count", 0, "setting llama.attention.head_count is 0, no number above 0"),
    ("llama.attention.head_count", 7, "128 rows of queries or keys are not those of 7 heads"),
    ("llama.embedding_length", 96, "and config.json asks for [512, 96]: it describes another mod"),
    ("llama.block_count", 3, "has no tensor model.layers.2.self_attn.q_proj.weight: it is inc"),
    ("llama.context_length", math.nan, "setting llama.context_length is nan, no number above 0"),
    ("llama.attention.layer_norm_rms_epsilon", None, "layer_norm_rms_epsilon is None, no number"),
    ("tokenizer.ggml.tokens", None, "the GGUF file has no tokenizer: copy or convert it again"),
]


@pytest.mark.parametrize(("name", "value", "says"), SETTINGS)
def test_broken_settings_of_gguf(
    name: str, value: object, says: str, source: Path, tmp_path: Path, commands: Commands
) -> None:
    whole, file = tmp_path / "whole.gguf", tmp_path / "model.gguf"
    commands.run(quantize, source, whole, "--bits=4", "--scheme=rtn", "--format=gguf")
    foreign.copy_gguf(whole, file, {name: value})
    assert says in commands.refused(command, file, tmp_path / "out")
    assert {path.name for path in tmp_path.iterdir()} == {"whole.gguf", "model.gguf"}


def test_what_is_no_quantized_checkpoint(source: Path, tmp_path: Path, commands: Commands) -> None:
    file, out = tmp_path / "model.gguf", tmp_path / "out"
    file.write_bytes(b"GGUF" + bytes(20))
    assert "model.gguf is no whole GGUF file" in commands.refused(command, file, out)
    assert "is not quantized: python -m quant.quantize" in commands.refused(command, source, out)
    assert "--format onnx: use pack-quantized or gguf" in commands.refused(
        command, source, out, "--format=onnx"
    )


def test_what_gguf_does_not_hold(source: Path, tmp_path: Path, commands: Commands) -> None:
    """Said before any work."""

    def refused(folder: Path, *options: str) -> str:
        arguments = ("--format=gguf", *options)
        line = commands.refused(quantize, folder, tmp_path / "model.gguf", *arguments)
        assert not (tmp_path / "model.gguf").exists()
        return line

    softpick = tiny_checkpoint(tmp_path / "softpick", "softpick")
    odd = tiny_checkpoint(tmp_path / "odd", "softmax", hidden_size=144)
    rtn = ("--bits=4", "--scheme=rtn")
    assert "does not write softpick attention: only softmax" in refused(softpick, *rtn)
    assert "its 144 columns are no blocks of 32" in refused(odd, *rtn)
    assert "zero points between quantized values" in refused(source, "--bits=4", "--scheme=hqq")
    assert "use --symmetric" in refused(source, "--bits=8", "--scheme=rtn")
    assert "use --symmetric" in refused(source, *rtn, "--embeddings=8")
    tokenizer = tmp_path / "tokenizer"
    shutil.copytree(source, tokenizer)
    content = json.loads((tokenizer / "tokenizer.json").read_text())
    content["added_tokens"].append({**content["added_tokens"][0], "id": 512})
    (tokenizer / "tokenizer.json").write_text(json.dumps(content))
    assert "token ids up to 512, and the embeddings 512 rows" in refused(tokenizer, *rtn)
    (tokenizer / "tokenizer.json").write_text("{")
    assert "tokenizer.json is no whole tokenizer: copy it again" in refused(tokenizer, *rtn)
    config = LlamaConfig.from_pretrained(source)
    assert config.rope_parameters["rope_type"] == "default"
    for entry, says in (
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}, "RoPE"),
        ({"sliding_window": 16}, "a sliding window"),
    ):
        other = tiny_checkpoint(tmp_path / says, "softmax", **entry)
        assert f"does not write {says}" in refused(other, *rtn)
