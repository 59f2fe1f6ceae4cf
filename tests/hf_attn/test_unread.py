"""A variant in a configuration that does not read it: vLLM refuses the same
(`tests/vllm_attn/test_refusals.py`)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoModelForCausalLM, BloomConfig, LlamaConfig, LlamaForCausalLM

from attn_kernels import variant_names
from hf_attn import VariantLlamaConfig
from hf_attn.unread import check_variant_is_read, refuse_unread_variants
from tests.tiny import write_tiny_llama

OTHERS = [name for name in variant_names() if name != "softmax"]


@pytest.fixture
def llama(tmp_path: Path) -> Path:
    return write_tiny_llama(tmp_path / "llama")


def declare(folder: Path, **fields: Any) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | fields))


@pytest.mark.parametrize("name", OTHERS)
def test_a_plain_llama_never_runs_softmax_silently(llama: Path, name: str) -> None:
    declare(llama, attention_variant={"name": name})
    with pytest.raises(ValueError, match=f'LlamaForCausalLM does.*attn_implementation="{name}"'):
        AutoModelForCausalLM.from_pretrained(llama)
    with pytest.raises(ValueError, match="variant_llama"):
        AutoModelForCausalLM.from_pretrained(llama, attn_implementation="eager")
    model = AutoModelForCausalLM.from_pretrained(llama, attn_implementation=name)
    assert model.config._attn_implementation == name
    with pytest.raises(ValueError, match="variant_llama"):
        model.set_attn_implementation("sdpa")


def test_softmax_is_what_it_says(llama: Path) -> None:
    declare(llama, attention_variant={"name": "softmax"})
    AutoModelForCausalLM.from_pretrained(llama)


def test_an_unknown_variant_is_refused_too(llama: Path) -> None:
    declare(llama, attention_variant={"name": "softpik"})
    with pytest.raises(ValueError, match="did you mean 'softpick'"):
        AutoModelForCausalLM.from_pretrained(llama)


def test_nested_configurations() -> None:
    config = LlamaConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1)
    config.text_config = {"attention_variant": {"name": "softpick"}}
    with pytest.raises(ValueError, match=r"in text_config\.attention_variant, which"):
        LlamaForCausalLM(config)
    config.text_config = {"inner": {"attention_variant": {"name": "softpick"}}}
    with pytest.raises(ValueError, match=r"in text_config\.inner\.attention_variant"):
        check_variant_is_read("LlamaForCausalLM", config, None)


def test_our_configuration_in_a_stock_class() -> None:
    config = VariantLlamaConfig(
        num_hidden_layers=1,
        hidden_size=8,
        num_attention_heads=1,
        attention_variant={"name": "softpick"},
    )
    with pytest.raises(ValueError, match=r"LlamaForCausalLM does not read.*use VariantLlama"):
        LlamaForCausalLM(config)


def test_importing_twice_checks_once() -> None:
    from transformers import PreTrainedModel

    method = PreTrainedModel.get_correct_attn_implementation
    refuse_unread_variants()
    assert PreTrainedModel.get_correct_attn_implementation is method


def test_a_model_that_computes_attention_itself() -> None:
    """Bloom asks for no attention function: it would run softmax with a wrong mask."""
    config = BloomConfig(vocab_size=64, hidden_size=32, n_layer=1, n_head=2)
    for name in variant_names():
        with pytest.raises(ValueError, match=f"computes attention itself and cannot run {name}"):
            AutoModelForCausalLM.from_config(config, attn_implementation=name)
