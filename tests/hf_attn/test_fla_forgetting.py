"""Checkpoints of flash-linear-attention's `forgetting_transformer` load as they are."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModel, AutoModelForCausalLM

import hf_attn
from attn_kernels import VariantError
from tests.fla_forgetting import EVERYTHING, clear_prompt, fox_checkpoint, fox_logits

SMALL: dict[str, Any] = {"num_hidden_layers": 2, "hidden_size": 64}
TOKENS = torch.randint(2, 256, (1, 40), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def logits(folder: Path) -> Tensor:
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False)
    answer: Tensor = model(input_ids=TOKENS).logits
    return answer


@pytest.mark.parametrize(
    "fields",
    [{}, {"num_kv_heads": 2}, {"tie_word_embeddings": True}, {"norm_eps": 1e-2}, EVERYTHING],
    ids=str,
)
def test_same_logits_as_the_reference(fields: dict[str, Any], tmp_path: Path) -> None:
    folder = fox_checkpoint(tmp_path, **SMALL | fields)
    expected = fox_logits(folder, TOKENS[0].tolist())
    assert expected.std() > 1
    torch.testing.assert_close(logits(folder)[0].double(), expected, atol=1e-4, rtol=1e-4)


def test_generate_a_padded_batch(tmp_path: Path) -> None:
    folder = fox_checkpoint(tmp_path, **SMALL, **EVERYTHING)
    pairs = [clear_prompt(folder, length, 12) for length in (3, 9, 20)]
    width = max(len(prompt) for prompt, _ in pairs)
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt, _ in pairs])
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p, _ in pairs])
    answer = AutoModelForCausalLM.from_pretrained(folder).generate(
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
    folder = fox_checkpoint(tmp_path, **SMALL, **EVERYTHING)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert type(model) is hf_attn.ForgettingTransformerForCausalLM
    assert not any(info.values()), info
    model.save_pretrained(tmp_path / "again")
    saved = load_file(tmp_path / "again" / "model.safetensors")
    weights = load_file(folder / "model.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[name], weights[name]) for name in saved)
    assert torch.equal(logits(tmp_path / "again"), logits(folder))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"window_size": 8}, "window_size 8 in config.json is not supported: flash-linear"),
        ({"hidden_act": "gelu"}, "hidden_act 'gelu' .* use swish or silu"),
        ({"attn": {"layers": [1]}}, r"attn \{'layers': \[1\]\} in config.json is not supported"),
        ({"attention_variant": {"name": "lssa"}}, "contradicts attn_impl 'forgetting'"),
    ],
)
def test_what_is_not_supported_is_one_clear_line(
    fields: dict[str, Any], message: str, tmp_path: Path
) -> None:
    folder = fox_checkpoint(tmp_path, **SMALL, **fields)
    with pytest.raises(VariantError, match=message) as error:
        AutoModelForCausalLM.from_pretrained(folder)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("tensor", ["f_proj.bias", "g_proj.weight", "q_norm.weight"])
def test_a_missing_tensor_is_an_error(tensor: str, tmp_path: Path) -> None:
    folder = fox_checkpoint(tmp_path, **SMALL, **EVERYTHING)
    weights = load_file(folder / "model.safetensors")
    del weights[f"model.layers.1.attn.{tensor}"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    for auto in (AutoModelForCausalLM, AutoModel):
        with pytest.raises(ValueError, match=rf"lacks .*layers\.1\..*attn\.{tensor}"):
            auto.from_pretrained(folder)


def test_a_tensor_that_the_configuration_does_not_know_is_an_error(tmp_path: Path) -> None:
    """Left out silently it would change every answer."""
    folder = fox_checkpoint(tmp_path, **SMALL, **EVERYTHING)
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"use_output_gate": False}))
    with pytest.raises(ValueError, match=r"the checkpoint has layers\.0\.attn\.g_proj\.weight,"):
        AutoModelForCausalLM.from_pretrained(folder)
