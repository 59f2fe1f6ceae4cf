"""What `quant.quantize` writes loads in transformers, whatever the bits, as the model that was
measured."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
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


ALL = [
    Recipe(bits, scheme, size, scheme == "gptq" and bits % 2 == 0, embeddings=embeddings)
    for bits in range(2, 9)
    for scheme in ("rtn", "gptq", "hqq", "two-level", "compressed-tensors")
    for size in (16, 32, 64, 128, None)
    for embeddings in (None, 10 - bits)
    if (size is not None if scheme == "two-level" else size != 16)
]
"""Every width, scheme and group size, with embeddings and without."""


@pytest.mark.slow
@pytest.mark.parametrize("bits", range(2, 9))
def test_every_cell(bits: int, tmp_path: Path) -> None:
    """The columns are 128 and 256, which all groups divide, as compressed-tensors wants it."""
    source = tiny_checkpoint(tmp_path / "source", "softpick", num_hidden_layers=1)
    for place, recipe in enumerate(recipe for recipe in ALL if recipe.bits == bits):
        text = TEXT if recipe.calibrated else None
        out = tmp_path / f"{place}"
        expected, _ = quantize_checkpoint(source, out, recipe, text, "a test")
        model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
        assert same(model, expected), recipe


ALONE = """
import sys
import torch
from transformers import AutoModelForCausalLM
for folder in sys.argv[1:]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with torch.inference_mode():
        logits = model(input_ids=torch.arange(3, 60)[None]).logits
    print(torch.equal(logits, torch.load(f"{folder}/logits.pt")))
assert "hf_attn" not in sys.modules
"""


@pytest.mark.integration
def test_without_this_package(tmp_path: Path) -> None:
    """What is plain compressed-tensors, its own library reads as well, to the bit."""
    source = write_tiny_llama(tmp_path / "source")
    recipes = [
        Recipe(2, "rtn", 32),
        Recipe(4, "gptq", 32, act_order=True, search=True),
        Recipe(4, "rtn", None, symmetric=True),
        Recipe(8, "rtn", 64),
    ]
    for place, recipe in enumerate(recipes):
        text, out = TEXT if recipe.calibrated else None, tmp_path / f"{place}"
        expected, _ = quantize_checkpoint(source, out, recipe, text, "a test")
        with torch.inference_mode():
            logits = expected(input_ids=torch.arange(3, 60)[None]).logits
        torch.save(logits, out / "logits.pt")
    folders = [str(tmp_path / f"{place}") for place in range(len(recipes))]
    done = subprocess.run(
        [sys.executable, "-c", ALONE, *folders], capture_output=True, text=True, cwd=tmp_path
    )
    assert done.stdout.split() == ["True"] * len(recipes), done.stderr


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
