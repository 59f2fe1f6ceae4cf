"""Quantized checkpoints on disk: they hold the sweep's weights; nothing is written by halves."""

from __future__ import annotations

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from compressed_tensors.compressors.pack_quantized.helpers import unpack_from_int32
from compressed_tensors.quantization import QuantizationConfig
from safetensors.torch import load_file
from torch import Tensor

from attnserve.evaluation.checkpoint import Checkpoint
from attnserve.evaluation.measures import Data
from attnserve.evaluation.scorers import load
from quant.model import quantize
from quant.quantize import quantize as command
from quant.schemes.registry import SCHEMES, get_scheme
from quant.texts import Sources, calibration_text
from quant_kernels.pack import unpack
from quant_kernels.weight import QuantizedWeight, QuantSpec
from tests.conftest import Commands
from tests.quantized import quantize as main
from tests.tiny import tiny_checkpoint

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
        (8, ["--scheme=gptq", "--act-order", "--group=128"]),
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
    found = quantize(model, scheme, spec, texts, act_order="--act-order" in arguments)
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


REFUSALS = [
    (["--bits=9", "--scheme=rtn"], "less than or equal to 8"),
    (["--bits=4", "--scheme=rtn", "--embeddings=1"], "greater than or equal to 2"),
    (["--bits=4", "--scheme=best"], "unknown scheme 'best': use one of rtn, hqq, gptq"),
    (
        ["--bits=4", "--scheme=bnb-nf4"],
        "scheme bnb-nf4 cannot be served: use one of rtn, hqq, gptq",
    ),
    (["--bits=4", "--scheme=hqq", "--symmetric"], "scheme hqq has no symmetric form"),
    (["--bits=4", "--scheme=rtn", "--act-order"], "--act-order is of the scheme gptq"),
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
