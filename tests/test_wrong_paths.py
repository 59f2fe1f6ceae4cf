"""Every command of training and benchmarks that is given a wrong path: one line, no traceback."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import pytest

from attnserve.files import CHECKOUT
from tests.tiny import LICENSE
from training.__main__ import COMMANDS

TRAINING = {command.__module__.removesuffix(".__main__") for command in COMMANDS}
WRONG = {
    "attnserve.evaluation.evaluate": "{bad}",
    "training.train": "--variant softpick --data {text} --tokenizer {bad} --out {out}",
    "training.tokenizer": "--data {bad} --out {out}",
    "training.tokens": "{bad} {out}/t.npy --data {text}",
    "training.chats": "{bad} {out}/c.jsonl",
    "training.convert": "{bad} {out} --variant ssmax",
    "attnserve.budgets.command": "{bad}",
    "training.long_context": "{bad} --texts {text}",
    "training.analyze": "{bad} --measures passkey",
    "training.compare": "{bad} {bad} --text {text} --out {out}",
    "training.report": "--results {file} --out {out}/r.md --figures {out}",
    "attnserve.evaluation.books": "--out {file}",
    "training.checkpoints": "--books {bad} --runs {out} --out {out}",
    "training.learning_rate": "--books {bad} --runs {out} --csv {out}/t.csv",
    "benchmarks.serve": "--ckpts {bad}",
    "benchmarks.memory": "--ckpts {bad}",
    "benchmarks.engines": "--packed {bad} --ckpt {bad}",
    "benchmarks.quantization": "{bad} --books {bad}",
    "benchmarks.smollm2": "{file}",
    "benchmarks.triton_compile.tables": "{bad}",
}
"""A path that is no checkpoint, text or folder, where the command reads or writes one."""
WITHOUT = {  # they read no path, and write only what they have measured
    *("benchmarks.kernels", "benchmarks.packed_products", "benchmarks.gateway"),
    "benchmarks.triton_compile",
    "benchmarks.triton_compile.candidates",
    "benchmarks.gpu",
    "benchmarks.gpu_check",
    "benchmarks.gpu_serving",
    "benchmarks.gpu_training",
    "benchmarks.gpu_packed",
}
OURS = ("attnserve.evaluation.evaluate", "attnserve.evaluation.books", "attnserve.budgets.command")
"""Modules that `attnserve` runs."""
CONFIGS = {"nothing": None, "no JSON": "{", "empty": "{}", "no mapping": "[]"}
"""What config.json holds in the folder that is named."""


def test_every_command_is_here() -> None:
    found: set[str] = set()
    for package in ("training", "benchmarks"):
        for file in (CHECKOUT / package).rglob("*.py"):
            parts = file.relative_to(CHECKOUT).with_suffix("").parts
            module = ".".join(parts).removesuffix(".__main__")
            inside = {
                "worker",
                "naive",
                "floor",
                "upstream",
                "engine",
                "gpu_engine",
            }  # processes that a command starts
            if '__name__ == "__main__"' in file.read_text() and file.stem not in inside:
                found.add(module)
    assert set(TRAINING) < found
    assert {*found, *OURS} == {*WRONG, *WITHOUT, "benchmarks", "training"}


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("module", WRONG)
def test_wrong_path(
    module: str,
    config: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    bad, out, file = tmp_path / "bad", tmp_path / "out", tmp_path / "file"
    file.write_text("a file")
    content = CONFIGS[config]
    if content is not None:
        bad.mkdir()
        (bad / "config.json").write_text(content)
    places = {"bad": bad, "out": out, "file": file, "text": LICENSE}
    monkeypatch.setattr(sys, "argv", [module, *WRONG[module].format(**places).split()])
    monkeypatch.setenv("ATTNSERVE_CACHE", str(tmp_path / "cache"))
    for name in (module, f"{module}.__main__"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    with pytest.raises(SystemExit) as ended:
        runpy.run_module(module, run_name="__main__", alter_sys=True)
    assert ended.value.code not in (0, None)
    line = (capsys.readouterr().err.splitlines() or [str(ended.value)])[-1]
    assert str(tmp_path) in line
    assert line.startswith((f"{module}: ", f"python -m {module}: ", "attnserve "))
