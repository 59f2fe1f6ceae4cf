"""training.long_context: its losses are the model's, it goes on where it was, and adds up right."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnserve.evaluation.texts import read_tokens
from tests.conftest import Commands
from tests.tiny import LICENSE, tiny_checkpoint
from training.convert import convert
from training.long_context import long_context
from training.positions import against, edges, octaves

LENGTH, SPACING = 300, 500


def test_edges() -> None:
    assert edges(300) == [0, 64, 128, 256, 300]
    assert edges(2048) == [0, 64, 128, 256, 512, 1024, 2048]
    assert edges(8192)[5:] == [1024, 2048, 4096, 6144, 8192]
    # A longer window only adds bins, so that rows of both can be compared.
    assert set(edges(8192)) < set(edges(16384))


def test_octaves_and_differences() -> None:
    """By hand: bins of unlike width, and a model that has read one window only."""
    bins = [("a", 0, 1, 2, 4.0), ("a", 0, 3, 4, 2.0), ("a", 9, 1, 2, 5.0), ("a", 9, 3, 4, 3.0)]
    bins += [("b", 0, 1, 2, 4.5), ("b", 0, 3, 4, 2.25)]
    table = pd.DataFrame(bins, columns=["model", "start", "seen_from", "seen_to", "loss"])
    table["text"] = "t"
    summary = against(octaves(table), "octave", "a").set_index(["model", "octave"])
    assert summary.loc[("a", 2), "loss"] == 4.5
    assert summary.loc[("a", 2), "loss_error"] == pytest.approx(0.5)
    assert summary.loc[("b", 4), "change"] == 0.25
    assert summary.loc[("b", 4), "windows"] == 1
    assert np.isnan(summary.loc[("b", 4), "change_error"])

    wide = pd.DataFrame({"model": "a", "text": "t", "start": 0, "seen_from": [5, 7]})
    wide["seen_to"], wide["loss"] = [6, 8], [1.0, 2.0]
    assert octaves(wide)["loss"].tolist() == [1.5]


@pytest.mark.integration
def test_measured_through_vllm(tmp_path: Path, commands: Commands) -> None:
    """ssmax with another rotary base, beyond max_position_embeddings: transformers' losses."""
    source, ckpt, csv = tmp_path / "source", tmp_path / "ssmax", tmp_path / "table.csv"
    tiny_checkpoint(source, "softmax", max_position_embeddings=128)
    commands.run(convert, source, ckpt, "--variant", "ssmax", "--rope-theta-factor", "50")
    text = tmp_path / "text.txt"
    text.write_text(LICENSE.read_text())
    command = [str(ckpt), "--texts", str(text), "--csv", str(csv), "--length", str(LENGTH)]
    command += ["--spacing", str(SPACING), "--windows", "2"]
    shown = json.loads(commands.run(long_context, *command, "--json"))["rows"]
    assert [row["octave"] for row in shown] == [64, 128, 256, 512]

    table = pd.read_csv(csv)
    assert set(table["model"]) == {"ssmax"}
    assert set(table["rope_theta"]) == {500000.0}
    model = AutoModelForCausalLM.from_pretrained(ckpt)
    tokens = read_tokens([text], AutoTokenizer.from_pretrained(ckpt))
    for start in (0, SPACING):
        window = torch.from_numpy(tokens[start : start + LENGTH])
        with torch.no_grad():
            logits = model(input_ids=torch.cat((torch.tensor([0]), window[:-1]))[None]).logits[0]
        losses = cross_entropy(logits, window, reduction="none")
        expected = [losses[a:b].mean().item() for a, b in pairwise(edges(LENGTH))]
        rows = table[table["start"] == start]
        assert rows["loss"].tolist() == pytest.approx(expected, abs=2e-4)

    before = csv.read_bytes()
    commands.run(long_context, *command)
    assert csv.read_bytes() == before, "what was there was measured again"

    config = json.loads((ckpt / "config.json").read_text())
    (ckpt / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-3}))
    line = commands.refused(long_context, *command)
    assert "rows of another checkpoint called ssmax: rename one" in line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["{tmp}"], "has no config.json: name a checkpoint's folder"),
        (["--csv", "{tmp}/none.csv"], "has no float32 rows: name a checkpoint to measure"),
        (["{ckpt}"], "emma.txt is not there: fetch the thirteen novels"),
        (["{ckpt}", "--texts", "{ckpt}/config.json"], "no text has 32768 tokens"),
    ],
)
def test_refused_in_one_line(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    commands: Commands,
) -> None:
    monkeypatch.setenv("ATTNSERVE_CACHE", str(tmp_path))
    places = {"tmp": tmp_path, "ckpt": tmp_path / "ckpt"}
    tiny_checkpoint(places["ckpt"], "softmax")
    argv = ("--csv", tmp_path / "t.csv", *(text.format(**places) for text in arguments))
    assert message in commands.refused(long_context, *argv)
