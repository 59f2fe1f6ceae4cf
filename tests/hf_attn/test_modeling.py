"""`VariantLlamaForCausalLM`: configuration, loading, saving, and what it refuses."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from attn_kernels import VariantError, get_variant, variant_names
from hf_attn import VariantLlamaConfig, VariantLlamaForCausalLM, VariantLlamaModel
from tests.tiny import tiny_checkpoint

IDS = torch.tensor([[5, 77, 31, 8, 220, 64, 3, 99]])
SMALL: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 64, "head_dim": 16}
LEARNED: list[tuple[dict[str, Any], str]] = [
    ({"name": name}, tensor) for name in variant_names() for tensor in get_variant(name).learned
]
LEARNED.append(({"name": "ssmax", "bias": True}, "ssmax_bias"))


@pytest.mark.parametrize("name", variant_names())
def test_auto_classes_load_what_was_saved(name: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, name, **SMALL)
    assert isinstance(AutoConfig.from_pretrained(folder), VariantLlamaConfig)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, VariantLlamaForCausalLM)
    headless = AutoModel.from_pretrained(folder)
    assert isinstance(headless, VariantLlamaModel)
    saved = load_file(folder / "model.safetensors")
    assert saved.keys() == model.state_dict().keys()
    for key, tensor in model.state_dict().items():
        assert torch.equal(tensor, saved[key]), key
    hidden = headless(input_ids=IDS).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), model(input_ids=IDS).logits)


def test_config_file_names_the_variant(tmp_path: Path) -> None:
    variant = {"name": "lssar", "power": 3.0}
    tiny_checkpoint(tmp_path, variant, **SMALL, sliding_window=8)
    config = json.loads((tmp_path / "config.json").read_text())
    assert config["architectures"] == ["VariantLlamaForCausalLM"]
    assert config["model_type"] == "variant_llama"
    assert config["attention_variant"] == variant
    assert config["sliding_window"] == 8
    assert AutoConfig.from_pretrained(tmp_path).variant == get_variant("lssar", power=3.0)


@pytest.mark.parametrize(("variant", "tensor"), LEARNED)
def test_learned_tensors(variant: dict[str, Any], tensor: str, tmp_path: Path) -> None:
    """One of `[num_heads]` in every layer, initialised by the variant, kept by a checkpoint."""
    config = VariantLlamaConfig(attention_variant=variant, vocab_size=32, **SMALL)
    fresh = dict(VariantLlamaForCausalLM(config).named_parameters())
    loaded = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(tmp_path, variant, **SMALL))
    initial = config.variant.initial(tensor)
    for layer in range(2):
        key = f"model.layers.{layer}.self_attn.{tensor}"
        assert fresh[key].tolist() == [initial] * 32
        values = loaded.get_parameter(key)
        assert values.shape == (4,)
        assert values.unique().numel() == 4


@pytest.mark.parametrize(("variant", "tensor"), LEARNED)
def test_a_missing_learned_tensor_is_an_error(
    variant: dict[str, Any], tensor: str, tmp_path: Path
) -> None:
    file = tiny_checkpoint(tmp_path, variant, **SMALL) / "model.safetensors"
    weights = load_file(file)
    key = f"model.layers.1.self_attn.{tensor}"
    del weights[key]
    save_file(weights, file, metadata={"format": "pt"})
    for auto in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(ValueError, match=rf"lacks .*layers\.1\.self_attn\.{tensor}"):
            auto.from_pretrained(tmp_path)


def test_learned_tensors_change_the_output(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(tmp_path, "ssmax", **SMALL))
    with torch.no_grad():
        before = model(input_ids=IDS).logits
        model.model.layers[0].self_attn.ssmax_scale[3] += 1
        assert (model(input_ids=IDS).logits - before).abs().max() > 0.01


@pytest.mark.parametrize(
    ("variant", "message"),
    [
        ({"name": "softpik"}, "did you mean 'softpick'"),
        ({"name": "softpick", "power": 2}, "no parameter 'power'"),
        ({"power": 2}, "must look like"),
        (None, "must name its attention function"),
    ],
)
def test_a_wrong_variant_is_one_clear_error(
    variant: dict[str, Any] | None, message: str, tmp_path: Path
) -> None:
    file = tiny_checkpoint(tmp_path, "softmax", **SMALL) / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_variant": variant}))
    with pytest.raises(VariantError, match=message):
        AutoModelForCausalLM.from_pretrained(tmp_path)


def test_a_window_of_one_is_refused() -> None:
    with pytest.raises(ValueError, match="sliding_window must be at least 2, not 1"):
        VariantLlamaConfig(attention_variant={"name": "softmax"}, sliding_window=1)


def test_another_implementation_is_refused(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "softpick", **SMALL)
    assert AutoModelForCausalLM.from_pretrained(folder, attn_implementation="softpick") is not None
    for implementation in ("sdpa", "eager", "softmax"):
        with pytest.raises(ValueError, match=f'"{implementation}" does not fit .* softpick'):
            AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation)
    model = AutoModelForCausalLM.from_pretrained(folder)
    with pytest.raises(ValueError, match='"sdpa" does not fit'):
        model.set_attn_implementation("sdpa")


@pytest.mark.parametrize("bias", [False, True])
def test_softmax_is_llama(bias: bool, tmp_path: Path) -> None:
    """Apart from attention it is transformers' Llama, with the same weights."""
    options = {"attention_bias": bias, "mlp_bias": bias, "tie_word_embeddings": not bias}
    model = AutoModelForCausalLM.from_pretrained(
        tiny_checkpoint(tmp_path, "softmax", **SMALL, **options)
    )
    fields = model.config.to_dict()
    for ours in ("attention_variant", "sliding_window", "model_type", "architectures"):
        del fields[ours]
    llama = LlamaForCausalLM(LlamaConfig(**fields, attn_implementation="eager"))
    llama.load_state_dict(model.state_dict())
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, llama(input_ids=IDS).logits)


@pytest.mark.parametrize("name", variant_names())
def test_packed_sequences_do_not_see_each_other(name: str, tmp_path: Path) -> None:
    """Positions that start again start a new sequence, also for learned lengths and selection."""
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(tmp_path, name, **SMALL))
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3, 4]])
    with torch.no_grad():
        packed = model(input_ids=IDS, position_ids=positions, use_cache=False).logits
        apart = [model(input_ids=part).logits for part in (IDS[:, :3], IDS[:, 3:])]
    torch.testing.assert_close(packed, torch.cat(apart, 1), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", variant_names())
def test_attention_weights_are_returned(name: str, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_checkpoint(tmp_path, name, **SMALL))
    weights = model(input_ids=IDS, output_attentions=True).attentions
    assert [tuple(layer.shape) for layer in weights] == [(1, 4, 8, 8)] * 2
    for layer in weights:
        assert (layer.triu(1) == 0).all()
        assert (layer >= 0).all() and layer.isfinite().all()
        assert (layer.sum(-1) > 0.5).any()


@pytest.mark.integration
def test_importing_the_package_is_enough(tmp_path: Path) -> None:
    """In a fresh process; the transformers loader needs no remote code."""
    tiny_checkpoint(tmp_path, "softpick", **SMALL)
    program = (
        "import sys, hf_attn; from transformers import AutoModelForCausalLM as A; "
        "print(type(A.from_pretrained(sys.argv[1], trust_remote_code=False)).__name__)"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, str(tmp_path)], check=True, capture_output=True, text=True
    )
    assert result.stdout == "VariantLlamaForCausalLM\n"
