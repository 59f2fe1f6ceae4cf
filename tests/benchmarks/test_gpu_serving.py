"""`python -m benchmarks.gpu_serving` without a GPU: tiny models on vLLM's CPU build."""

from __future__ import annotations

import json
import time
from pathlib import Path

import psutil
import pytest
import torch

from attnserve.command import expanded
from benchmarks import gpu_serving
from benchmarks.gpu_engine import Arguments
from tests.conftest import Commands


@pytest.mark.integration
def test_an_engine_that_works_and_one_that_does_not(tmp_path: Path, commands: Commands) -> None:
    csv = tmp_path / "serving.csv"
    arguments = ["--device=cpu", f"--csv={csv}", f"--log-folder={tmp_path}", "--json"]
    arguments += ["--seconds=600", "--new-tokens=33"]
    engines = ["--engines", "selective:8", "NO_SUCH_ATTN"]
    found = json.loads(commands.run(gpu_serving.gpu_serving, *arguments, *engines, code=1))
    start, first, second = found["rows"]
    assert {row["engine"] for row in found["rows"]} == {"selective:8"}
    assert start["load"] == "start" and start["s"] > 1
    assert (first["load"], second["load"]) == ("2 x 40", "6 x 100")
    for row in (first, second):
        assert row["prefill_tokens_per_s"] > 0 and row["decode_ms_per_step"] > 0
    # A cache of 1 MiB has room for 8 tokens a layer of each.
    assert second["in_flight"] == 6
    config = json.loads((tmp_path / "gpu-engine-selective-8/config.json").read_text())
    assert config["attention_variant"] == {"name": "selective", "kv_budgets": [8, 8]}
    (fault,) = found["faults"]
    assert fault.startswith("NO_SUCH_ATTN: 0 of 3 rows, see ")
    assert "no_such_attn" in Path(fault.rpartition("see ")[2]).read_text().lower()

    written = csv.read_text()
    more = [*(given for given in arguments if given != "--json"), "--minutes=0"]
    printed = commands.run(gpu_serving.gpu_serving, *more, *engines, code=1)
    assert csv.read_text() == written
    assert "selective:8: taken from" in commands.printed.err
    assert "NO_SUCH_ATTN: out of time, run again" in commands.printed.err
    assert "1.00/1.00/1.00" in printed


def test_an_engine_that_takes_too_long_is_ended(tmp_path: Path) -> None:
    arguments = Arguments("softpick", 0, 2, True, 1 << 20, False, [(1, 8)], 2, str(tmp_path / "m"))
    before = set(psutil.Process().children(recursive=True))
    began = time.monotonic()
    assert list(gpu_serving.run(arguments, tmp_path / "log", 0.5)) == []
    assert time.monotonic() - began < 10
    assert set(psutil.Process().children(recursive=True)) <= before


@pytest.mark.parametrize(
    ("engine", "said"),
    [
        ("softpik", "--engines softpik: "),
        ("softpick:256", "softpick takes no budgets"),
        ("FLASH_ATTN:256", "FLASH_ATTN takes no budgets"),
        ("selective:few", "'few' is no number of tokens"),
    ],
)
def test_unknown_engines_are_one_line(engine: str, said: str, commands: Commands) -> None:
    assert said in commands.refused(gpu_serving.gpu_serving, "--device=cpu", "--engines", engine)


@pytest.mark.skipif(
    torch.cuda.is_available(),
    reason="it is the refusal of a machine without a GPU, and here is one",
)
def test_no_gpu_is_one_line(commands: Commands) -> None:
    assert "finds no GPU; --device cpu" in commands.refused(gpu_serving.gpu_serving, "--no-save")


def test_a_gpu_has_the_shape_of_a_real_model() -> None:
    """Llama's own class with vLLM's backends, ours with variants; a graph of each load's size."""
    given = (8, False, 5 << 30, False, [(8, 8192), (64, 8192)], 65, str(expanded("m")))
    stock, ours = Arguments("FLASH_ATTN", 0, *given), Arguments("softpick", 0, *given)
    assert stock.config()["architectures"] == ["LlamaForCausalLM"]
    assert "attention_variant" not in stock.config()
    assert ours.config()["attention_variant"] == {"name": "softpick"}
    assert ours.config()["num_hidden_layers"] == 8 and ours.config()["head_dim"] == 128
    options = ours.options()
    assert options["max_model_len"] == 8257
    assert options["compilation_config"]["cudagraph_capture_sizes"] == [1, 8, 64]
