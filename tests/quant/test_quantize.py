"""Quantized checkpoints on disk: they hold the sweep's weights; nothing is written by halves."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import GPT2Config, GPT2LMHeadModel, MixtralConfig, MixtralForCausalLM

from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.measures import Data
from attnserve.evaluation.scorers import load
from quant import checkpoint as checkpoints
from quant.kept import Kept
from quant.model import quantize
from quant.quantize import quantize as command
from quant.schemes.registry import SCHEMES, Scheme, get_scheme
from quant.schemes.rtn import rtn
from quant.sensitivity import sensitivity
from quant.sweep import sweep
from quant.texts import Sources, calibration_text
from quant_kernels.pack import unpack
from quant_kernels.weight import QuantizedWeight, QuantSpec
from tests.conftest import Commands
from tests.quantized import quantize as main
from tests.tiny import LICENSE, tiny_checkpoint

LAYERS = 14
"""Linear layers of the fixture's model."""


def read_back(tensors: dict[str, Tensor], layer: str, args: dict[str, Any]) -> Tensor:
    """Return a weight from its tensors, float32 `[rows, columns]`."""
    rows, columns = tensors[f"{layer}.weight_shape"].tolist()
    spec = QuantSpec(args["num_bits"], args["group_size"], args["symmetric"])
    quantized = unpack(tensors[f"{layer}.weight_packed"], spec.bits, columns)
    if 32 % spec.bits == 0:  # the library packs other bits with gaps
        packed = tensors[f"{layer}.weight_packed"]
        signed = unpack_from_int32(packed, spec.bits, torch.Size((rows, columns)))
        assert torch.equal(signed.int() + spec.midpoint, quantized.int())
    zeros = tensors.get(f"{layer}.weight_zero_point")
    if zeros is not None and zeros.dtype == torch.int32:
        zeros = unpack(zeros.T.contiguous(), spec.bits, rows).T
    return QuantizedWeight(quantized, tensors[f"{layer}.weight_scale"], zeros, spec).dequantize()


@pytest.mark.parametrize(
    ("bits", "arguments"),
    [
        (2, ["--scheme=gptq"]),
        (3, ["--scheme=hqq", "--group=32"]),
        (4, ["--scheme=rtn", "--symmetric"]),
        (5, ["--scheme=rtn", "--group=channel"]),
        (8, ["--scheme=gptq", "--group=128"]),
    ],
)
def test_files_hold_the_sweeps_weights(
    softpick: Path, data: Data, tmp_path: Path, bits: int, arguments: list[str]
) -> None:
    out = tmp_path / "out"
    main([str(softpick), str(out), f"--bits={bits}", *arguments, f"--books={data.books}"])
    config = json.loads((out / "config.json").read_text())
    (group,) = QuantizationConfig.model_validate(
        config["quantization_config"]
    ).config_groups.values()
    args = config["quantization_config"]["config_groups"]["group_0"]["weights"]
    assert group.weights.num_bits == bits
    # As `quant.measure.quantized_model` does it.
    scheme = get_scheme(arguments[0].removeprefix("--scheme="))
    model, texts = load(softpick), torch.empty(0, dtype=torch.long)
    if scheme.calibrated:
        reader, sources = Checkpoint(softpick, longest=512), Sources(books=data.books)
        texts = calibration_text(sources, reader, 16, 0).rows
    spec = QuantSpec(bits, args["group_size"], args["symmetric"])
    found = quantize(model, scheme, spec, texts, options={"act_order": True, "search": True})
    tensors = load_file(out / "model.safetensors")
    assert len(found) == LAYERS
    for layer in found:
        weight = model.get_submodule(layer).weight
        assert torch.equal(read_back(tensors, layer, args), weight), layer
        assert f"{layer}.weight" not in tensors


def test_the_rest_stays(softpick: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    shutil.copytree(softpick, tmp_path / "source")
    (tmp_path / "source/README.md").write_text("# A card\n")
    (tmp_path / "source/notes.bin").write_bytes(b"0")
    main([str(tmp_path / "source"), str(out), "--bits=4", "--scheme=rtn"])
    before, after = (json.loads((f / "config.json").read_text()) for f in (softpick, out))
    assert after.pop("quantization_config")["ignore"] == ["lm_head"]
    assert after == before
    old, new = (load_file(folder / "model.safetensors") for folder in (softpick, out))
    for name in set(old) & set(new):
        assert torch.equal(old[name], new[name])
    assert len(set(old) - set(new)) == LAYERS
    assert (out / "tokenizer.json").read_bytes() == (softpick / "tokenizer.json").read_bytes()
    card = (out / "README.md").read_text()
    assert card.startswith("# A card\n")
    assert "`python -m quant.quantize --bits 4 --scheme rtn --group-size 64`" in card
    assert not (out / "notes.bin").exists()


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings(tied: bool, tmp_path: Path, commands: Commands) -> None:
    """One matrix if the head is tied to them; the table adds up to what is on disk."""
    source = tiny_checkpoint(tmp_path / "source", "softmax", tie_word_embeddings=tied)
    argv = [source, tmp_path / "out", "--bits=3", "--scheme=rtn", "--embeddings=5", "--json"]
    parts = json.loads(commands.run(command, *argv))["parts"]
    config = json.loads((tmp_path / "out/config.json").read_text())["quantization_config"]
    args = config["config_groups"]["group_1"]["weights"]
    tensors = load_file(tmp_path / "out/model.safetensors")
    model = load(source)
    tables = ["model.embed_tokens", *([] if tied else ["lm_head"])]
    for layer in tables:
        weight = model.get_submodule(layer).weight
        error = (read_back(tensors, layer, args) - weight).abs()
        steps = tensors[f"{layer}.weight_scale"].float().repeat_interleave(64, 1)
        assert (error <= 0.5001 * steps).all()
    assert ("lm_head.weight_packed" in tensors) == (not tied)
    assert parts["embeddings"]["numbers"] == sum(
        model.get_submodule(layer).weight.numel() for layer in tables
    )
    sizes = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
    assert parts["all"]["after"] == sizes
    assert sum(part["after"] for name, part in parts.items() if name != "all") == sizes
    # Of each group of 64: a scale of 16 bits and a zero point of 3; a few bytes of each layer.
    assert 3 + 19 / 64 <= 8 * parts["linear"]["after"] / parts["linear"]["numbers"] < 3.35


def test_int8_activations(softpick: Path, tmp_path: Path) -> None:
    """vLLM's own format: signed bytes, a scale for each row, and how inputs are rounded."""
    out, flags = tmp_path / "out", ["--symmetric", "--group=channel", "--activations"]
    main([str(softpick), str(out), "--bits=8", "--scheme=rtn", *flags])
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    (group,) = QuantizationConfig.model_validate(config).config_groups.values()
    assert config["format"] == "int-quantized"
    assert (group.input_activations.strategy, group.input_activations.dynamic) == ("token", True)
    tensors, model = load_file(out / "model.safetensors"), load(softpick)
    found = quantize(model, get_scheme("rtn"), QuantSpec(8, None, True), torch.empty(0))
    for layer in found:
        weight, scale = tensors[f"{layer}.weight"], tensors[f"{layer}.weight_scale"]
        assert weight.dtype == torch.int8
        assert torch.equal(weight.float() * scale.float(), model.get_submodule(layer).weight)


KV8 = "--kv-cache-dtype=int8_per_token_head"


def test_keys_and_values(softpick: Path, tmp_path: Path) -> None:
    """config.json names their format; weights are quantized as without it, or stay as they are."""
    rtn, whole, alone = ["--bits=4", "--scheme=rtn"], tmp_path / "whole", tmp_path / "alone"
    main([str(softpick), str(tmp_path / "out"), *rtn, KV8])
    main([str(softpick), str(whole), *rtn])
    main([str(softpick), str(alone), KV8])
    for folder, like in ((tmp_path / "out", whole), (alone, softpick)):
        config, before = (json.loads((f / "config.json").read_text()) for f in (folder, like))
        assert config == before | {"kv_cache_dtype": "int8_per_token_head"}
        found, old = (load_file(f / "model.safetensors") for f in (folder, like))
        assert found.keys() == old.keys() and all(torch.equal(found[n], old[n]) for n in old)
    assert (
        "`python -m quant.quantize --kv-cache-dtype int8_per_token_head`"
        in (alone / "README.md").read_text()
    )
    # What has only that is ours to replace, too, and can be quantized further.
    main([str(softpick), str(alone), KV8.replace("8", "4"), "--overwrite"])
    main([str(alone), str(whole), *rtn, "--overwrite"])
    assert json.loads((whole / "config.json").read_text())["kv_cache_dtype"].startswith("int4")


def test_keys_and_values_that_cannot_be_served(tmp_path: Path, commands: Commands) -> None:
    pruned = tiny_checkpoint(tmp_path / "a", {"name": "selective", "kv_budgets": [8, 4, 12]})
    odd = tiny_checkpoint(tmp_path / "b", "softmax", head_dim=12)
    for ckpt, says in ((pruned, "has kv_budgets, which do not go"), (odd, "a head size of 12")):
        assert says in commands.refused(command, ckpt, tmp_path / "out", KV8.replace("8", "4"))
        assert not (tmp_path / "out").exists()


def test_several_files(softpick: Path, tmp_path: Path) -> None:
    """A checkpoint in shards is quantized as one in a single file."""
    source = tmp_path / "source"
    model = load(softpick)
    model.save_pretrained(source, max_shard_size="300KB")
    assert len(list(source.glob("*.safetensors"))) > 2
    main([str(source), str(tmp_path / "out"), "--bits=4", "--scheme=rtn"])
    main([str(softpick), str(tmp_path / "whole"), "--bits=4", "--scheme=rtn"])
    found, whole = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "whole"))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert not list((tmp_path / "out").glob("*.index.json"))


@pytest.mark.parametrize("stale", ["consolidated", "model"])
def test_files_that_the_index_does_not_name(softpick: Path, tmp_path: Path, stale: str) -> None:
    """Are not read: Mistral's other layout, or what an earlier save has left."""
    source, out = tmp_path / "source", tmp_path / "out"
    load(softpick).save_pretrained(source, max_shard_size="300KB")
    old = load_file(softpick / "model.safetensors")
    renamed = {f"{stale}.{name}" if stale != "model" else name: -x for name, x in old.items()}
    save_file(renamed, source / f"{stale}.safetensors", metadata={"format": "pt"})
    main([str(source), str(out), "--bits=4", "--scheme=rtn"])
    main([str(softpick), str(tmp_path / "whole"), "--bits=4", "--scheme=rtn"])
    found, whole = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "whole"))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)


DOWN, NORM = "model.layers.1.mlp.down_proj.weight", "model.norm.weight"


def one_weight(name: str, value: float) -> Callable[[Path], object]:
    """Return what gives a checkpoint one other weight."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        tensors[name].flatten()[3] = value
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def without(name: str, shape: tuple[int, ...] | None = None) -> Callable[[Path], object]:
    """Return what takes a tensor from a checkpoint, or gives it another shape."""

    def change(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        del tensors[name]
        if shape:
            tensors[name] = torch.zeros(shape)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def integers(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors[NORM] = tensors[NORM].to(torch.int8)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def unknown(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)  # old, harmless
    tensors["model.layers.7.extra.weight"] = torch.ones(4, 4)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def configured(**fields: Any) -> Callable[[Path], object]:
    """Return what changes config.json."""

    def change(folder: Path) -> None:
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | fields))

    return change


def cut(folder: Path) -> None:
    os.truncate(folder / "model.safetensors", 5000)


def pointer(folder: Path) -> None:
    """Leave what git does where git-lfs is not installed."""
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n"
    (folder / "model.safetensors").write_text(text)


def index_of(content: str) -> Callable[[Path], object]:
    return lambda folder: (folder / "model.safetensors.index.json").write_text(content)


def of_gpt2(folder: Path) -> None:
    config = GPT2Config(n_embd=64, n_layer=1, n_head=2, vocab_size=64)
    GPT2LMHeadModel(config).save_pretrained(folder)


def of_mixtral(folder: Path) -> None:
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "vocab_size": 64}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_local_experts": 2}
    MixtralForCausalLM(MixtralConfig(**shape, **heads)).save_pretrained(folder)


BROKEN: list[tuple[Callable[[Path], object], str]] = [
    (one_weight(DOWN, torch.nan), f"{DOWN} in *source/model.safetensors has a weight of nan"),
    (one_weight(DOWN, -torch.inf), f"{DOWN} in *source/model.safetensors has a weight of inf"),
    (one_weight(DOWN, 3e38), f"{DOWN} in *source/model.safetensors has a weight of 3e+38: only"),
    (one_weight(NORM, torch.nan), f"{NORM} in *source/model.safetensors has a weight of nan"),
    (without(NORM), f"source has no tensor {NORM}: it is incomplete, or its names are not"),
    (without(DOWN), f"source has no tensor {DOWN}: it is incomplete"),
    (without(NORM, (127,)), f"{NORM} of *source is [127], and config.json asks for [128]"),
    (cut, "source/model.safetensors is no whole safetensors file (*): copy or download it again"),
    (pointer, "source/model.safetensors is no whole safetensors file (*): copy or download it"),
    (index_of("{"), "source/model.safetensors.index.json is no index of safetensors: copy it"),
    (index_of('{"weight_map": {"a": "b.safetensors"}}'), "names b.safetensors, which is not th"),
    (integers, f"{NORM} in *source/model.safetensors is torch.int8, no floating-point type: it"),
    (unknown, "source has a tensor model.layers.7.extra.weight, which the model that its config"),
    (configured(head_dim=0), "config.json of *source describes no model: "),
    (configured(intermediate_size=0), "of *source is [256, 128], and config.json asks for [0, 1"),
    (of_mixtral, "source has experts (model.layers.0.mlp.experts.gate_up_proj), which are not"),
    (of_gpt2, "source is a gpt2, whose layers gptq cannot quantize: use a model like Llama"),
]


@pytest.mark.parametrize(("change", "says"), BROKEN)
def test_broken_checkpoints(
    softpick: Path,
    tmp_path: Path,
    commands: Commands,
    change: Callable[[Path], object],
    says: str,
) -> None:
    """One line before any work, and nothing is written."""
    source = Path(shutil.copytree(softpick, tmp_path / "source"))
    change(source)
    for scheme in ("gptq", "rtn"):
        line = commands.refused(command, source, tmp_path / "out", "--bits=4", f"--scheme={scheme}")
        pattern = says.replace("gptq", scheme).replace("[", "[[]")
        assert fnmatch.fnmatchcase(line, f"*{pattern}*"), line
        assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (one_weight(DOWN, torch.nan), f"{DOWN} in *source/model.safetensors has a weight of nan"),
        (one_weight(NORM, -torch.inf), f"{NORM} in *source/model.safetensors has a weight of inf"),
        (cut, "source/model.safetensors is no whole safetensors file (*): copy or download it"),
        (of_mixtral, "source has experts (model.layers.0.mlp.experts.gate_up_proj), which are not"),
    ],
)
@pytest.mark.parametrize("measure", [sweep, sensitivity])
def test_broken_checkpoints_are_not_measured(
    softpick: Path,
    tmp_path: Path,
    commands: Commands,
    change: Callable[[Path], object],
    says: str,
    measure: Callable[..., None],
) -> None:
    source = Path(shutil.copytree(softpick, tmp_path / "source"))
    change(source)
    line = commands.refused(measure, source, "--out", tmp_path / "out")
    assert fnmatch.fnmatchcase(line, f"*{says}*"), line
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_inputs_that_overflow(softpick: Path, tmp_path: Path, commands: Commands) -> None:
    """No weight is too large, but what they make of a text is."""
    source = Path(shutil.copytree(softpick, tmp_path / "source"))
    tensors = load_file(source / "model.safetensors")
    tensors["model.layers.0.post_attention_layernorm.weight"] *= 1e30
    save_file(tensors, source / "model.safetensors", metadata={"format": "pt"})
    text = tmp_path / "text.txt"
    text.write_text(LICENSE.read_text())
    given = ["--scheme=gptq", f"--calibration-text={text}", "--calibration=2", "--length=32"]
    line = commands.refused(command, source, tmp_path / "out", "--bits=4", *given)
    assert "the inputs of model.layers.0.mlp.gate_proj are too large for float32: use a" in line
    assert not (tmp_path / "out").exists() and len(list(tmp_path.iterdir())) == 2


def test_output_that_cannot_be_written(softpick: Path, tmp_path: Path, commands: Commands) -> None:
    """Said before the work, not after it."""
    file, out = tmp_path / "file", tmp_path / "file/deep/out"
    file.touch()
    line = commands.refused(command, softpick, out, "--bits=4", "--scheme=rtn")
    assert f"{out} cannot be written, since {file} cannot: name another folder" in line


def test_full_disk(softpick: Path, tmp_path: Path, commands: Commands) -> None:
    """As far as a test can fill one: no file may be larger than so much."""
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, limits[1]))
    try:
        line = commands.refused(command, softpick, tmp_path / "out", "--bits=4", "--scheme=rtn")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert f"{tmp_path} cannot be written: " in line and "File too large" in line
    (left,) = tmp_path.iterdir()  # what is quantized is not lost
    names = {file.name for file in left.iterdir()}
    assert "model.layers.0.self_attn.q_proj.safetensors" in names and "part" not in names
    commands.run(command, softpick, tmp_path / "out", "--bits=4", "--scheme=rtn")
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("scheme", ["rtn", "gptq", "hqq", "two-level"])
def test_a_killed_run_goes_on(
    softpick: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch, scheme: str
) -> None:
    """At the layer where it was; the result is that of a run that nobody stopped."""
    given = ["--bits=4", f"--scheme={scheme}", "--embeddings=8", "--calibration=2", "--length=32"]
    made: list[Tensor] = []
    original = Scheme.__call__

    def counted(self: Scheme, weight: Tensor, *args: Any, **options: Any) -> QuantizedWeight:
        made.append(weight)
        if len(made) == 9:
            raise KeyboardInterrupt
        return original(self, weight, *args, **options)

    monkeypatch.setattr(Scheme, "__call__", counted)
    commands.run(command, softpick, tmp_path / "out", *given, code=130)
    assert not (tmp_path / "out").exists() and len(made) == 9
    commands.run(command, softpick, tmp_path / "out", *given)
    assert len(made) == 9 + LAYERS - 8
    commands.run(command, softpick, tmp_path / "whole", *given)
    found, whole = (load_file(tmp_path / f / "model.safetensors") for f in ("out", "whole"))
    assert found.keys() == whole.keys()
    assert all(torch.equal(found[name], whole[name]) for name in whole)
    assert {path.name for path in tmp_path.iterdir()} == {"out", "whole"}


@pytest.mark.integration
def test_sigkill(tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch) -> None:
    """The process has no chance to say or mend anything."""
    source = tiny_checkpoint(tmp_path / "source", "softpick", num_hidden_layers=24)
    out, left = tmp_path / "out", tmp_path / ".out.quantized"
    given = [str(source), str(out), "--bits=4", "--scheme=rtn"]
    process = subprocess.Popen(
        [sys.executable, "-m", "quant.quantize", *given],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    while len(list(left.glob("*.safetensors"))) < 20 and process.poll() is None:
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    kept = {file.name for file in left.glob("*.safetensors")}
    assert 20 <= len(kept) < 168 and not out.exists()
    made: list[Tensor] = []
    original = Scheme.__call__

    def counted(self: Scheme, weight: Tensor, *args: Any, **options: Any) -> QuantizedWeight:
        made.append(weight)
        return original(self, weight, *args, **options)

    monkeypatch.setattr(Scheme, "__call__", counted)
    commands.run(command, *given)
    assert len(made) == 168 - len(kept)
    commands.run(command, source, tmp_path / "whole", *given[2:])
    for name in ("model.safetensors", "config.json", "README.md"):
        assert (out / name).read_bytes() == (tmp_path / "whole" / name).read_bytes(), name
    assert {path.name for path in tmp_path.iterdir()} == {"source", "out", "whole"}


def test_a_killed_run_with_other_settings(
    softpick: Path, tmp_path: Path, commands: Commands, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it has left is of no use."""

    def killed(self: Scheme, *args: Any, **options: bool) -> QuantizedWeight:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Scheme, "__call__", killed)
        arguments = (softpick, tmp_path / "out", "--scheme=rtn", "--embeddings=8")
        commands.run(command, *arguments, "--bits=3", code=130)
    assert "stopped; the layers that are quantized are kept" in commands.printed.err
    left = tmp_path / ".out.quantized"
    assert (left / "model.embed_tokens.safetensors").exists()
    main([str(softpick), str(tmp_path / "out"), "--bits=4", "--scheme=rtn", "--embeddings=4"])
    assert not left.exists()
    shape = load_file(tmp_path / "out/model.safetensors")["model.embed_tokens.weight_packed"].shape
    assert shape[1] == 128 * 4 // 32


def test_what_a_killed_machine_leaves(softpick: Path, tmp_path: Path, commands: Commands) -> None:
    """Files that were not on the disk yet are empty; their layers are quantized again."""
    left = tmp_path / ".out.quantized"
    given = ["--bits=4", "--scheme=rtn", "--symmetric"]

    def killed(*args: Any) -> None:
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "write_checkpoint", killed)
        commands.run(command, softpick, tmp_path / "out", *given, code=130)
    kept = sorted(left.glob("*.safetensors"))
    kept[0].write_bytes(b"")
    os.truncate(kept[1], 100)
    commands.run(command, softpick, tmp_path / "out", *given)
    commands.run(command, softpick, tmp_path / "whole", *given)
    found, whole = (tmp_path / f / "model.safetensors" for f in ("out", "whole"))
    assert found.read_bytes() == whole.read_bytes() and not left.exists()


def test_two_runs_of_one_output(softpick: Path, tmp_path: Path, commands: Commands) -> None:
    """The second ends at once, and takes nothing from the first."""
    given = [softpick, tmp_path / "out", "--bits=4", "--scheme=rtn"]
    with closing(Kept(tmp_path / ".out.quantized", {})) as first:
        first["a"] = rtn(torch.randn(4, 32), QuantSpec(4))
        line = commands.refused(command, *given)
        assert "another run is using" in line and "wait for it, or name another output" in line
        assert (first.folder / "a.safetensors").exists() and not (tmp_path / "out").exists()
    commands.run(command, *given)
    assert {path.name for path in tmp_path.iterdir()} == {"out"}


def test_links_and_files_are_replaced(softpick: Path, tmp_path: Path, commands: Commands) -> None:
    """A folder takes the place of a GGUF file, and of what a link points at, not of the link."""
    given = ["--bits=4", "--scheme=rtn", "--overwrite"]
    (tmp_path / "file").write_bytes(b"GGUF")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for name in ("link", "file", "link"):
        commands.run(command, softpick, tmp_path / name, *given)
        assert (tmp_path / "file/model.safetensors").exists()
    assert {path.name for path in tmp_path.iterdir()} == {"file", "link"}
    (tmp_path / "file/config.json").write_text("{")
    assert "is no quantized checkpoint" in commands.refused(
        command, softpick, tmp_path / "file", *given
    )


REFUSALS = [
    (["--bits=9", "--scheme=rtn"], "less than or equal to 8"),
    (["--bits=4", "--scheme=rtn", "--embeddings=1"], "greater than or equal to 2"),
    (["--bits=4", "--scheme=best"], "unknown scheme 'best': use one of rtn, hqq, gptq, two-level"),
    (
        ["--bits=4", "--scheme=bnb-nf4"],
        "scheme bnb-nf4 cannot be served: use one of two-level, gptq, hqq, rtn",
    ),
    (["--bits=4", "--scheme=hqq", "--symmetric"], "scheme hqq has no symmetric form"),
    (["--scheme=rtn"], "give either --bits or --bits-per-weight"),
    (["--bits=4", "--bits-per-weight=4.5"], "give either --bits or --bits-per-weight"),
    (["--bits-per-weight=3", "--scheme=rtn"], "needs a calibrated scheme: two-level or gptq"),
    (["--bits-per-weight=3", "--scheme=gptq", "--symmetric"], "per-weight: leave out --symmetric"),
    (
        ["--bits=4", "--kv-cache-dtype=fp8"],
        "--kv-cache-dtype fp8: use int8_per_token_head or int4_per_token_head",
    ),
    (["--bits=4", "--format=gguf", KV8], "--kv-cache-dtype is vLLM's: leave out --format gguf"),
    (["--bits-per-weight=2"], "--bits-per-weight 2.0: the least possible is 2.24"),
    (["--bits-per-weight=2.23"], "--bits-per-weight 2.23: the least possible is 2.24"),
    (["--bits-per-weight=2.2", "--scheme=gptq"], "per-weight 2.2: the least possible is 2."),
    (["--bits=2", "--group=48"], "scheme two-level has groups of 16 or of a multiple of 32"),
    (
        ["--bits=4", "--scheme=rtn", "--group=48"],
        "--group-size 48: use a multiple of 32",
    ),
    (["--bits=4", "--scheme=rtn", "--activations"], "--activations needs --bits 8 --symmetric"),
    (["--bits=4", "--scheme=gptq", "--books=nowhere"], "nowhere"),
    (
        ["--bits=4", "--scheme=gptq", "--calibration-text", "nowhere.txt"],
        "nowhere.txt is not there",
    ),
    (["--bits=4", "--scheme=gptq", "--text-from=nowhere"], "nowhere has no config.json"),
]


@pytest.mark.parametrize(("arguments", "says"), REFUSALS)
def test_refused_in_one_line(
    softpick: Path, tmp_path: Path, commands: Commands, arguments: list[str], says: str
) -> None:
    assert says in commands.refused(command, softpick, tmp_path / "out", *arguments)
    assert len(commands.printed.err.splitlines()) == 1
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("lack", "says"),
    [
        ({"bits": (4, 8)}, "scheme rtn cannot do 3 bits: it has 4, 8"),
        ({"library": "no_such_library"}, "scheme rtn needs the library no_such_library, which is"),
    ],
)
def test_bits_or_a_library_that_a_scheme_lacks(
    softpick: Path,
    tmp_path: Path,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
    lack: dict[str, Any],
    says: str,
) -> None:
    monkeypatch.setitem(SCHEMES, "rtn", dataclasses.replace(SCHEMES["rtn"], **lack))
    test_refused_in_one_line(softpick, tmp_path, commands, ["--bits=3", "--scheme=rtn"], says)


def test_folders_that_will_not_do(softpick: Path, tmp_path: Path, commands: Commands) -> None:
    """What is no checkpoint, or quantized already, and what must not be overwritten."""
    out, empty, mine = tmp_path / "out", tmp_path / "empty", tmp_path / "mine"
    empty.mkdir()
    mine.mkdir()
    (mine / "thesis.txt").write_text("mine")

    def refused(source: Path, target: Path, *arguments: str) -> str:
        return commands.refused(command, source, target, "--bits=4", "--scheme=rtn", *arguments)

    main([str(softpick), str(out), "--bits=4", "--scheme=rtn"])
    assert "empty has no config.json" in refused(empty, tmp_path / "new")
    assert "is quantized already" in refused(out, tmp_path / "new")
    assert "is there already: --overwrite replaces it" in refused(softpick, out)
    assert "is the checkpoint itself" in refused(softpick, softpick, "--overwrite")
    assert "is no quantized checkpoint" in refused(softpick, mine, "--overwrite")
    assert (mine / "thesis.txt").exists()
    shutil.copy(softpick / "config.json", empty)
    assert "has no *.safetensors" in refused(empty, tmp_path / "new")
    main([str(softpick), str(out), "--bits=3", "--scheme=rtn", "--overwrite"])
    config = json.loads((out / "config.json").read_text())["quantization_config"]
    assert config["config_groups"]["group_0"]["weights"]["num_bits"] == 3
    assert {path.name for path in tmp_path.iterdir()} == {"out", "empty", "mine"}
