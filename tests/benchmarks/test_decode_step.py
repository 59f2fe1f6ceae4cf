"""`python -m benchmarks.decode_step`: its stopwatch, its figures, and a run of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from attn_kernels import cpu, get_variant, variant_names
from benchmarks import decode_step as bench
from tests.tiny import tiny_checkpoint


class Layer:
    """Something with a method that calls another."""

    def outer(self) -> int:
        spin(0.002)
        return self.inner() + 1

    def inner(self) -> int:
        spin(0.004)
        return 1


def spin(seconds: float) -> None:
    """Do nothing for that long."""
    end = time.perf_counter() + seconds
    while time.perf_counter() < end:
        pass


def test_time_of_inner_calls_is_counted_once() -> None:
    watch, layer = bench.Stopwatch(), Layer()
    points = [bench.Point(layer, "outer", "a"), bench.Point(layer, "inner", "b")]
    with watch.installed(points):
        start = time.perf_counter()
        assert layer.outer() == 2
        whole = time.perf_counter() - start
    assert watch.calls == {"a": 1, "b": 1}
    assert watch.spent["a"] >= 0.002 and watch.spent["b"] >= 0.004
    assert sum(watch.spent.values()) == pytest.approx(watch.inner[0])
    assert watch.inner[0] <= whole


def test_wrappers_leave_no_trace() -> None:
    watch, layer, module = bench.Stopwatch(), Layer(), SimpleNamespace(function=len)
    points = [bench.Point(layer, "inner", "a"), bench.Point(module, "function", "b")]
    with pytest.raises(TypeError), watch.installed(points):
        module.function(3)
    assert watch.calls == {"b": 1}
    assert module.function is len
    assert not vars(layer)
    layer.inner()
    assert watch.calls == {"b": 1}


def test_finds_the_c_functions_of_a_layer() -> None:
    kernel = cpu.load(get_variant("softmax"))
    assert kernel is not None
    layer = kernel.layer(torch.zeros(1, 1, 16, 64), num_heads=1, scale=1.0)
    watch = bench.Stopwatch()
    with watch.installed(bench.kernel_points(SimpleNamespace(layer=layer))):
        layer.write_cache(torch.ones(1, 1, 32), torch.ones(1, 1, 32), torch.tensor([3]))
    assert watch.calls == {bench.WRITE: 1}
    assert layer.kv_cache.sum() == 64


OPERATORS = {"_C::onednn_mm": 5e-3, "aten::bmm": 9e-3, "## Call CompiledFxGraph None ##": 1e-3}


def figures(compiled: bool) -> dict[str, Any]:
    """Of two instrumented steps of 10 ms, 2 layers."""
    parts = {bench.MODEL: 6e-3, bench.ATTENTION: 2e-3, bench.BACKEND: 1e-4, bench.LOGITS: 1e-3}
    found = bench.Profile([9e-3, 9e-3], [10e-3, 10e-3], [parts, parts], {bench.BACKEND: 4})
    return bench.summary(found, 2, OPERATORS, compiled)


def test_figures() -> None:
    eager = figures(compiled=False)
    assert eager["step_ms"] == pytest.approx(9.0)
    assert eager["instrumentation_ms"] == pytest.approx(1.0)
    assert eager["attention_share"] == pytest.approx(0.21)
    assert eager["backend_python_us_per_layer"] == pytest.approx(50.0)
    assert eager["parts_ms"][bench.MODEL] == pytest.approx(6.0)


def test_compiled_code_is_split_by_the_profiler() -> None:
    parts = figures(compiled=True)["parts_ms"]
    assert bench.MODEL not in parts
    assert parts[bench.LINEAR] == pytest.approx(5.0)
    assert parts[bench.POINTWISE] == pytest.approx(1.0)
    assert sum(parts.values()) == pytest.approx(sum(figures(compiled=False)["parts_ms"].values()))


def command(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    """The command, run to its end."""
    line = [sys.executable, "-m", "benchmarks.decode_step", *map(str, arguments)]
    return subprocess.run(line, capture_output=True, text=True, check=False)


def test_bad_input_is_one_line() -> None:
    ended = command("--ckpt", "nowhere")
    assert ended.returncode == 2
    assert "nowhere is not a checkpoint" in ended.stderr.splitlines()[-1]


@pytest.mark.parametrize("name", variant_names())
def test_defaults_fit_the_checkpoint(name: str, tmp_path: Path) -> None:
    ckpt = tiny_checkpoint(tmp_path, name)  # 1024 tokens
    options = bench.parse(["--ckpt", str(ckpt)])
    assert options.backend == name
    assert options.prompt_len + bench.answer_length(options) == 1024
    with pytest.raises(SystemExit):
        bench.parse(["--ckpt", str(ckpt), "--prompt-len", str(options.prompt_len + 1)])


@pytest.mark.slow
@pytest.mark.parametrize("backend", ["cpu_attn", "softmax"])
def test_profiles_a_step(backend: str, tmp_path: Path) -> None:
    folder = tiny_checkpoint(tmp_path, "softmax")
    ended = command(
        *("--ckpt", folder, "--backend", backend, "--prompt-len", "200", "--batch", "2"),
        *("--steps", "5", "--profiled-steps", "2", "--threads", "1", "--enforce-eager"),
        *("--kv-cache-bytes", "64000000"),
    )
    assert ended.returncode == 0, ended.stderr
    found = json.loads(ended.stdout.splitlines()[-1])
    parts = found["parts_ms"]
    for label in (bench.ATTENTION, bench.WRITE, bench.BACKEND, bench.LINEAR, bench.SAMPLING):
        assert parts[label] > 0, label
    assert 0 < found["attention_share"] < 1
    assert found["layers"] == 3
