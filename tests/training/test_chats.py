"""`training.chats` writes what `training.convert` reads, by vLLM."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from tests.servers import COMMON_ENV
from tests.tiny import tiny_checkpoint
from training.data import data_tokens
from training.tokenizer import complete


def chat_model(folder: Path) -> Path:
    """Write a tiny checkpoint with the template of the bundled ones."""
    tiny_checkpoint(folder, "softpick")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    complete(tokenizer)
    tokenizer.save_pretrained(folder)
    return folder


def run(*argv: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "training.chats", *argv]
    environment = {**os.environ, **COMMON_ENV}
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=300, check=False
    )


@pytest.mark.integration
def test_chats_end_with_a_turn(tmp_path: Path) -> None:
    """A tiny model ends a text at any token, one time in as many as it has."""
    folder, out = chat_model(tmp_path / "chatty"), tmp_path / "chats.jsonl"
    done = run(str(folder), str(out), "--count=24", "--tokens=300", "--json")
    assert done.returncode == 0, done.stderr[-3000:]
    record = json.loads(done.stdout)
    lines = out.read_text(encoding="utf-8").splitlines()
    assert 0 < record["chats"] == len(lines) < record["begun"] == 24
    chats = [json.loads(line)["messages"] for line in lines]
    assert all([turn["role"] for turn in chat] == ["user", "assistant"] for chat in chats)
    assert len({chat[0]["content"] for chat in chats}) == len(chats)  # not one text over and over
    assert len(data_tokens([out], AutoTokenizer.from_pretrained(folder))) > len(chats)


def test_wrong_input_is_one_line(tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path / "silent", "softpick")
    done = run(str(folder), str(tmp_path / "chats.txt"))
    assert done.returncode == 2
    assert "must be named *.jsonl" in done.stderr
    done = run(str(chat_model(tmp_path / "chatty")), str(tmp_path / "c.jsonl"), "--tokens=600")
    assert done.returncode == 2
    assert "reads 1024: lower --tokens" in done.stderr
    done = run(str(folder), str(tmp_path / "chats.jsonl"))
    assert done.returncode == 2
    assert "has no chat template: name a chat model" in done.stderr
