"""Checkpoints of flash-linear-attention's `transformer` load as they are, without remote code."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

import hf_attn
from attn_kernels import VariantError
from tests.fla import VARIANTS, clear_prompt, fla_checkpoint, fla_logits

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 64, "hidden_ratio": 2}
EVERYTHING: dict[str, Any] = SMALL | {"num_kv_heads": 2, "qk_norm": True, "qkv_bias": True}
TOKENS = torch.randint(2, 256, (1, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    answer: Tensor = model(input_ids=TOKENS).logits
    return answer


def edit_config(folder: Path, **fields: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | fields))


def edit_weights(
    folder: Path, add: Mapping[str, Tensor] | None = None, remove: str | None = None
) -> None:
    file = folder / "model.safetensors"
    weights = load_file(file) | dict(add or {})
    if remove:
        del weights[remove]
    save_file(weights, file, metadata={"format": "pt"})


@pytest.mark.parametrize("attn_impl", [name for name in VARIANTS if "scaled" not in name])
@pytest.mark.parametrize(
    "fields",
    [
        pytest.param({}, id="published"),
        pytest.param({"num_kv_heads": 2}, id="gqa"),
        pytest.param({"tie_word_embeddings": True}, id="tied"),
        pytest.param({"window_size": 8}, id="window"),
        pytest.param({"qkv_bias": True}, id="bias"),
        pytest.param(
            {
                "intermediate_size": 96,
                "hidden_ratio": None,
                "hidden_act": "silu",
                "norm_eps": 1e-2,
                "rope_theta": 50.0,
                "max_position_embeddings": 64,
            },
            id="sizes",
        ),
    ],
)
def test_same_logits_as_our_own_format(
    attn_impl: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    folder = fla_checkpoint(tmp_path, **SMALL | fields, attn_impl=attn_impl)
    assert torch.equal(logits(folder), logits(tmp_path / "own"))
    own = AutoConfig.from_pretrained(tmp_path / "own")
    assert AutoConfig.from_pretrained(folder).variant == own.variant  # eps is too small for logits


@pytest.mark.parametrize("attn_impl", VARIANTS)
def test_same_logits_as_the_reference(attn_impl: str, tmp_path: Path) -> None:
    """With all that our own format lacks: QK-norm, and the learned scale of the scaled ones."""
    folder = fla_checkpoint(tmp_path, **EVERYTHING, attn_impl=attn_impl)
    expected = fla_logits(folder, TOKENS[0].tolist())
    assert expected.std() > 1
    torch.testing.assert_close(logits(folder)[0].double(), expected, atol=1e-4, rtol=1e-4)


def test_a_scale_in_a_window(tmp_path: Path) -> None:
    """The scale is that of the position, not of the number of visible keys."""
    fields = EVERYTHING | {"attn_impl": "parallel_scaled_softpick_attn", "window_size": 8}
    folder = fla_checkpoint(tmp_path, **fields)
    expected = fla_logits(folder, TOKENS[0].tolist())
    torch.testing.assert_close(logits(folder)[0].double(), expected, atol=1e-4, rtol=1e-4)


def test_generate_a_padded_batch(tmp_path: Path) -> None:
    folder = fla_checkpoint(tmp_path, **EVERYTHING, attn_impl="parallel_scaled_softpick_attn")
    pairs = [clear_prompt(folder, length, 12) for length in (3, 9, 20)]
    width = max(len(prompt) for prompt, _ in pairs)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in pairs])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in pairs])
    model = AutoModelForCausalLM.from_pretrained(folder)
    answer = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=12,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert answer[:, width:].tolist() == [expected for _, expected in pairs]


def test_every_tensor_is_read_and_written_again(tmp_path: Path) -> None:
    """Nothing is missing or unexpected; what is saved has the format's names and loads again."""
    fields = EVERYTHING | {"attn_impl": "parallel_scaled_attn"}
    folder = fla_checkpoint(tmp_path, **fields)
    edit_weights(folder, add={"model.layers.0.attn.rotary.inv_freq": torch.ones(8)})
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is hf_attn.TransformerForCausalLM
    assert not any(info.values()), info
    model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    weights = load_file(folder / "model.safetensors")
    derived = {name for name in weights if name.endswith(("logn", "inv_freq"))}
    assert saved.keys() == weights.keys() - derived
    assert all(torch.equal(saved[name], weights[name]) for name in saved)
    assert torch.equal(logits(tmp_path / "again"), logits(folder))
    headless = AutoModel.from_pretrained(folder)
    assert type(headless) is hf_attn.TransformerModel
    hidden = headless(input_ids=TOKENS).last_hidden_state
    torch.testing.assert_close(model.lm_head(hidden), logits(folder))


def test_defaults_are_the_format_s(tmp_path: Path) -> None:
    """A `config.json` that leaves out what has its default, as the authors' own files do."""
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "transformer"}))
    config = AutoConfig.from_pretrained(tmp_path)
    assert (config.num_hidden_layers, config.num_attention_heads) == (24, 32)
    assert (config.num_key_value_heads, config.head_dim) == (32, 64)
    assert (config.hidden_size, config.intermediate_size) == (2048, 5632)
    assert config.variant.name == "softmax"
    edit_config(tmp_path, hidden_size=1024, num_heads=16)
    assert AutoConfig.from_pretrained(tmp_path).intermediate_size == 2816


ACCEPTED = "use one of " + ", ".join(VARIANTS)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"attn_impl": "parallel_softpik_attn"}, f"'parallel_softpik_attn' .* {ACCEPTED}"),
        ({"attn_impl": "parallel_rectified_attn"}, f"'parallel_rectified_attn' .* {ACCEPTED}"),
        ({"attn_impl": None}, f"attn_impl None .* {ACCEPTED}"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' .* use swish or silu"),
        ({"attn": {"layers": [1]}}, r"attn \{'layers': \[1\]\} in config.json is not supported"),
        ({"attnres_block_size": 4}, "attnres_block_size 4 in config.json is not supported"),
        ({"scale_base": 512.0}, "scale_base 512.0 in config.json is not supported"),
        ({"attention_variant": {"name": "lssa"}}, "contradicts attn_impl 'parallel_softpick_attn'"),
    ],
)
def test_what_is_not_supported_is_one_clear_line(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = fla_checkpoint(tmp_path, **SMALL)
    edit_config(folder, **fields)
    with pytest.raises(VariantError, match=message) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tensor", ["attn.s", "attn.q_norm.weight", "attn.v_proj.bias"])
def test_a_missing_tensor_is_an_error(tensor: str, tmp_path: Path) -> None:
    folder = fla_checkpoint(tmp_path, **EVERYTHING, attn_impl="parallel_scaled_attn")
    edit_weights(folder, remove=f"model.layers.1.{tensor}")
    for auto in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(ValueError, match=rf"the checkpoint lacks layers\.1\.{tensor},"):
            auto.from_pretrained(folder)


@pytest.mark.parametrize(
    ("tensor", "fields"),
    [
        ("attn.s", {"attn_impl": "parallel_softpick_attn"}),
        ("attn.q_norm.weight", {"qk_norm": False}),
        ("attn.q_proj.bias", {"qkv_bias": False}),
    ],
)
def test_a_tensor_that_the_configuration_does_not_know_is_an_error(
    tensor: str, fields: dict[str, Any], tmp_path: Path
) -> None:
    """Left out silently it would change every answer."""
    attn_impl = "parallel_scaled_softpick_attn"
    folder = fla_checkpoint(tmp_path, **EVERYTHING, attn_impl=attn_impl)
    edit_config(folder, **fields)
    with pytest.raises(ValueError, match=rf"the checkpoint has layers\.0\.{tensor},"):
        AutoModelForCausalLM.from_pretrained(folder)
