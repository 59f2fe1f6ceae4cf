"""The example of training in one's own code: it is the Llama that it is exported as."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_attn  # noqa: F401  registers the model class
from attn_kernels import get_variant, variant_names
from examples import train_llama
from tests.docs.text import ROOT

pytestmark = pytest.mark.integration


@pytest.mark.parametrize("name", variant_names())
def test_exported_model_is_the_one_that_was_trained(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The checkpoint gives the same logits as the script."""
    made: list[train_llama.Llama] = []

    class Kept(train_llama.Llama):
        def __init__(self, *args: object) -> None:
            super().__init__(*args)  # type: ignore[arg-type]  # what main gives
            made.append(self)

    monkeypatch.setattr(train_llama, "Llama", Kept)
    monkeypatch.setattr(train_llama, "CONTEXT", 32)
    command = ["train_llama.py", str(tmp_path), f"--variant={name}", "--steps=4", "--text"]
    monkeypatch.setattr(sys, "argv", [*command, str(ROOT / "LICENSE")])
    train_llama.main()

    model = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    assert model.config.variant == get_variant(name)
    ids = AutoTokenizer.from_pretrained(tmp_path)("Licensed under the Apache", return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(
            model(ids.input_ids).logits, made[0](ids.input_ids), rtol=1e-4, atol=1e-4
        )
