"""Checkpoints name the way to this package for those who forget to import it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_attn import VariantLlamaConfig
from hf_attn.configuration import AUTO_CODE, AUTO_FILE, AUTO_MAP
from tests.quantized import quantize
from tests.tiny import tiny_checkpoint

LOAD = """
import sys
from transformers import AutoConfig, AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=len(sys.argv) > 3)
print(type(model).__module__, model.config.variant.name)
model.save_pretrained(sys.argv[2])
"""
CHECKPOINTS = sorted(Path(__file__).parents[2].glob("checkpoints/*/config.json"))


def run(*arguments: object, home: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", LOAD, *map(str, arguments)],
        env={**os.environ, "HF_HOME": str(home)},
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.integration
def test_without_the_import(tmp_path: Path) -> None:
    """transformers says which option to give, and it works; what is saved is as before."""
    folder = tiny_checkpoint(tmp_path / "model", "softpick")
    refused = run(folder, tmp_path / "out", home=tmp_path)
    assert refused.returncode == 1
    assert "trust_remote_code=True" in refused.stderr
    done = run(folder, tmp_path / "out", "trust", home=tmp_path)
    assert done.stdout.split() == ["hf_attn.modeling", "softpick"], done.stderr
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == sorted(
        file.name for file in folder.iterdir() if not file.name.startswith("tokenizer")
    )
    assert json.loads((tmp_path / "out/config.json").read_text())["auto_map"] == AUTO_MAP


def test_a_quantized_copy_keeps_it(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "model", "softpick")
    quantize([str(folder), str(tmp_path / "out"), "--bits=4", "--scheme=rtn"])
    assert (tmp_path / "out" / AUTO_FILE).read_text() == AUTO_CODE
    assert json.loads((tmp_path / "out/config.json").read_text())["auto_map"] == AUTO_MAP


@pytest.mark.parametrize("config", CHECKPOINTS, ids=lambda path: path.parent.name)
def test_bundled_checkpoints_name_it(config: Path) -> None:
    assert json.loads(config.read_text())["auto_map"] == AUTO_MAP
    assert config.with_name(AUTO_FILE).read_text() == AUTO_CODE
    assert VariantLlamaConfig.from_pretrained(config.parent).variant
