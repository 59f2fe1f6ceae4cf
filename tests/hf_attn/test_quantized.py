"""What `quant.quantize` writes loads in transformers, whatever the bits, as the model that was
measured."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from attnserve.evaluation.texts import Text
from quant.checkpoint import Recipe, quantize_checkpoint
from quant_kernels.weight import QuantSpec
from tests.foreign import write_compressed
from tests.tiny import tiny_checkpoint, write_tiny_llama


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model whose 176 columns are no whole number of groups of 64."""
    folder = tmp_path_factory.mktemp("source")
    return tiny_checkpoint(folder, "softpick", intermediate_size=176, num_hidden_layers=2)


def same(a: PreTrainedModel, b: PreTrainedModel) -> bool:
    """Return whether two models give the same logits."""
    ids = torch.arange(3, 60)[None]
    with torch.inference_mode():
        return torch.equal(a(input_ids=ids).logits, b(input_ids=ids).logits)


RECIPES = [
    Recipe(2, "rtn", 32),
    Recipe(3, "hqq", embeddings=3),
    Recipe(4, "rtn", symmetric=True),
    Recipe(5, "rtn", None),
    Recipe(6, "hqq", 128, embeddings=8),
    Recipe(7, "rtn", None, symmetric=True),
    Recipe(8, "rtn", embeddings=2),
    Recipe(2, "two-level", embeddings=8),
    Recipe(3, "two-level"),
]
TEXT = Text("numbers", 0, [list(range(start, start + 48)) for start in range(3, 99, 8)])
"""What calibrated schemes are calibrated on."""


@pytest.mark.parametrize("recipe", RECIPES, ids=str)
def test_all_that_is_written(recipe: Recipe, source: Path, tmp_path: Path) -> None:
    """A loaded model is a plain one, which can be saved."""
    text = TEXT if recipe.calibrated else None
    expected, _ = quantize_checkpoint(source, tmp_path / "out", recipe, text, "a test")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    assert same(model, expected)
    assert not hasattr(model.config, "quantization_config")
    model.save_pretrained(tmp_path / "again")
    assert "quantization_config" not in json.loads((tmp_path / "again/config.json").read_text())
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "again"), expected)


def test_layers_of_different_bits(source: Path, tmp_path: Path) -> None:
    recipe = Recipe(2, "two-level", bits_per_weight=2.6)
    specs = {"model.layers.1.mlp.down_proj": QuantSpec(3, 32)}
    expected, _ = quantize_checkpoint(source, tmp_path / "out", recipe, TEXT, "a test", specs)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), expected)


@pytest.mark.parametrize("tied", [True, False])
def test_plain_llama(tied: bool, tmp_path: Path) -> None:
    """Any model of transformers, in 16 bits too."""
    write_tiny_llama(tmp_path / "source")
    config = tmp_path / "source/config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"tie_word_embeddings": tied}))
    recipe = Recipe(3, "rtn", embeddings=5)
    expected, _ = quantize_checkpoint(tmp_path / "source", tmp_path / "out", recipe, None, "")
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=dtype)
        weights = dict(expected.named_parameters())
        for name, parameter in model.named_parameters():
            assert parameter.dtype == dtype and torch.equal(parameter, weights[name].to(dtype))


def test_act_order(source: Path, tmp_path: Path) -> None:
    expected = write_compressed(source, tmp_path / "out", act_order=True)
    assert same(AutoModelForCausalLM.from_pretrained(tmp_path / "out"), expected)


def test_int8_stays_the_librarys(source: Path, tmp_path: Path) -> None:
    """Its layers round their inputs."""
    recipe = Recipe(8, "rtn", None, symmetric=True, activations=True)
    quantize_checkpoint(source, tmp_path / "out", recipe, None, "a test")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.model.layers[0].mlp.up_proj.quantization_scheme.input_activations.num_bits == 8


def test_a_layer_that_cannot_be_read(source: Path, tmp_path: Path) -> None:
    """Loading fails and names it: nothing is filled with random numbers."""
    quantize_checkpoint(source, tmp_path / "out", Recipe(4, "rtn"), None, "a test")
    file = tmp_path / "out/model.safetensors"
    tensors = load_file(file)
    for name in ("weight_packed", "weight_scale", "weight_zero_point", "weight_shape"):
        broken = Path(shutil.copytree(tmp_path / "out", tmp_path / name))
        left = {key: x for key, x in tensors.items() if key != f"model.layers.1.mlp.up_proj.{name}"}
        save_file(left, broken / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(RuntimeError, match="during automatic conversion of the weights"):
            AutoModelForCausalLM.from_pretrained(broken)
