"""`python -m quant.sweep` as a user runs it: measured once, resumed after a kill, refused."""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import psutil
import pytest

from quant import runner
from quant.config import QuantConfig
from quant.measure import SweepTask, measure
from quant.report.__main__ import report
from quant.schemes.registry import SCHEMES, installed
from quant.sensitivity import sensitivity
from quant.store import SweepResult, read, read_all
from quant.sweep import sweep
from tests.conftest import Commands
from tests.quant.conftest import SMALL
from tests.quantized import quantize

ROOT = Path(__file__).parents[2]


def times(out: Path) -> dict[str, int]:
    """When each result was written."""
    return {path.stem: path.stat().st_mtime_ns for path in out.glob("configs/*/*.json")}


@pytest.mark.integration
def test_results_reports_and_what_is_there_already(
    softpick: Path, texts: list[str], tmp_path: Path, commands: Commands
) -> None:
    argv = [str(softpick), *texts, f"--out={tmp_path}", "--bits", "2", "8", "--groups", "32"]
    argv += ["--what", "weights", "kv"]
    line = json.loads(commands.run(sweep, *argv, "--schemes", "rtn", "--json"))
    assert "5 configs to measure, 0 there already" in commands.printed.err
    assert "100%" in commands.printed.err and "5/5" in commands.printed.err
    names = {"unquantized", "weights-rtn-w2-g32", "weights-rtn-w8-g32", "kv-kv2", "kv-kv8"}
    expected = {f"softpick {name}" for name in names - {"unquantized"}}
    assert set(line["test KL"]) == expected and not line["failed"]
    assert set(times(tmp_path)) == names

    # More schemes: only those are measured. Every output holds every config.
    before = times(tmp_path)
    printed = commands.run(sweep, *argv, "--schemes", "rtn", "hqq", "gptq")
    assert "4 configs to measure, 5 there already" in printed
    after = times(tmp_path)
    assert len(after) == 9 and before.items() <= after.items()
    results = read_all(tmp_path)
    assert results[0].config == QuantConfig() and len(results) == 9
    rows = pd.read_csv(tmp_path / "configs.csv")
    assert len(rows) == len(json.loads((tmp_path / "configs.json").read_text())) == 9
    for stored, (_, row) in zip(results, rows.iterrows(), strict=True):
        assert row["target"] == stored.config.target and row["bytes"] == stored.size["bytes"]
        if stored.config != QuantConfig():
            ends = [row[f"test KL{end}"] for end in ("", " low", " high")]
            assert ends == pytest.approx(list(stored.summary["test KL"]))
    assert {"resident bytes", "tokens per second"} <= set(rows)
    plots = {path.stem for path in (tmp_path / "plots").glob("*.png")}
    assert plots == {"weights", "kv", "schemes"}
    page = (tmp_path / "report.html").read_text()
    assert page.count("<figure>") == 3 and "http" not in page

    # The report is the same when it is made again from the results alone.
    for path in (*tmp_path.glob("configs.*"), tmp_path / "report.html"):
        path.unlink()
    assert json.loads(commands.run(report, f"--results={tmp_path}", "--json"))["configs"] == 9
    assert (tmp_path / "report.html").read_text() == page
    assert len(pd.read_csv(tmp_path / "configs.csv")) == 9


@pytest.mark.integration
def test_a_kill_loses_one_config(softpick: Path, tmp_path: Path, commands: Commands) -> None:
    """On sampled text, which is the same afterwards."""
    argv = [str(softpick), *SMALL, f"--out={tmp_path}", "--what", "kv", "--bits"]
    bits = [str(each) for each in range(2, 9)]
    command = [sys.executable, "-m", "quant.sweep", *argv, *bits]
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    ) as process:
        while len(times(tmp_path)) < 3 and process.poll() is None:
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
    assert process.returncode == -signal.SIGKILL
    before = times(tmp_path)
    assert 3 <= len(before) < 8
    for path in tmp_path.glob("configs/*/*.json"):
        assert read(path).checkpoint == "softpick"
    measured: list[SweepTask] = []

    def counted(task: SweepTask) -> SweepResult:
        measured.append(task)
        return measure(task)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("quant.runner.measure", counted)
        commands.run(sweep, *argv, *bits)
    assert len(measured) == 8 - len(before)
    after = times(tmp_path)
    assert len(after) == 8 and before.items() <= after.items()


def test_a_failed_config_does_not_stop_the_others(
    softpick: Path,
    texts: list[str],
    tmp_path: Path,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:

    def unlucky(task: SweepTask) -> SweepResult:
        if task.config.kv == 4:
            raise RuntimeError("out of\nluck")
        return measure(task)

    monkeypatch.setattr("quant.runner.measure", unlucky)
    argv = [str(softpick), *texts, f"--out={tmp_path}", "--what", "kv", "--bits", "2", "4", "8"]
    printed = commands.run(sweep, *argv, "--json", code=1)
    assert "failed: softpick kv-kv4: RuntimeError: out of luck" in commands.printed.err
    assert json.loads(printed)["failed"] == {"softpick kv-kv4": "RuntimeError: out of luck"}
    assert set(times(tmp_path)) == {"unquantized", "kv-kv2", "kv-kv8"}
    monkeypatch.undo()
    commands.run(sweep, *argv)
    assert set(times(tmp_path)) == {"unquantized", "kv-kv2", "kv-kv4", "kv-kv8"}


def test_without_the_unquantized_model_there_is_nothing_to_compare_with(
    softpick: Path,
    texts: list[str],
    tmp_path: Path,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def too_large(task: SweepTask) -> SweepResult:
        raise MemoryError

    monkeypatch.setattr("quant.runner.measure", too_large)
    argv = [softpick, *texts, f"--out={tmp_path}", "--what", "kv", "--bits", "8", "--json"]
    failed = json.loads(commands.run(sweep, *argv, code=1))["failed"]
    assert failed["softpick kv-kv8"] == "the unquantized model could not be measured"
    assert not times(tmp_path)


def test_a_result_of_something_else_is_not_replaced(
    softpick: Path, texts: list[str], tmp_path: Path, commands: Commands
) -> None:
    argv = [str(softpick), *texts, f"--out={tmp_path}", "--what", "kv", "--bits", "8"]
    commands.run(sweep, *argv)
    before = times(tmp_path)
    line = commands.refused(sweep, *argv, "--pairs", "3")
    assert "holds a result that differs in samples: --force measures again and replaces it" in line
    assert times(tmp_path) == before
    commands.run(sweep, *argv, "--pairs", "3", "--force")
    assert before.keys() == times(tmp_path).keys() and before.items().isdisjoint(
        times(tmp_path).items()
    )
    (tmp_path / "configs" / "softpick" / "kv-kv8.json").write_text("{}")
    assert "is not a result of quant.sweep" in commands.refused(sweep, *argv, "--pairs", "3")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--bits 1", "Input should be greater than or equal to 2"),
        ("--bits 4 16", "Input should be less than or equal to 8"),
        ("--bits four", "Input should be a valid integer"),
        ("--schemes awq", "unknown scheme 'awq': use one of rtn, hqq, gptq, two-level, compressed"),
        ("--schemes hqq --symmetric", "scheme hqq has no symmetric form: leave out --symmetric"),
        ("--schemes compressed-tensors --groups 48", "cannot cut 128 columns into groups of 48"),
        ("--what cache", "unknown target 'cache': use one or several of weights, activations, kv"),
        ("--groups 0", "0 is neither a whole number above 0 nor channel"),
        ("--ray", "--ray needs the library ray, which is not installed: pip install -e '.[ray]'"),
        ("--books nowhere", "emma.txt is not there"),
        ("--eval nowhere", "name its folder with --eval"),
    ],
)
def test_what_cannot_be_is_one_line(
    change: str, message: str, softpick: Path, texts: list[str], tmp_path: Path, commands: Commands
) -> None:
    if "--ray" in change and installed("ray"):
        pytest.skip("ray is installed here, so that it is not missing")
    line = commands.refused(sweep, str(softpick), *texts, f"--out={tmp_path}", *change.split())
    assert message in line
    assert not times(tmp_path)


def test_checkpoints_that_there_are_not(
    softpick: Path, texts: list[str], tmp_path: Path, commands: Commands
) -> None:
    line = commands.refused(sweep, "nowhere", *texts, f"--out={tmp_path}")
    assert "nowhere has no config.json: name a checkpoint's folder" in line
    line = commands.refused(sweep, str(softpick), str(softpick), *texts, f"--out={tmp_path}")
    assert "two checkpoints are called softpick: their results would clash" in line


def test_what_is_quantized_is_not_taken_for_exact(
    softpick: Path, texts: list[str], tmp_path: Path, commands: Commands
) -> None:
    packed = tmp_path / "packed"
    quantize([str(softpick), str(packed), "--bits=4", "--scheme=rtn"])
    line = commands.refused(sweep, str(packed), *texts, f"--out={tmp_path}")
    assert f"{packed} is quantized already: name the checkpoint that it was made from" in line
    line = commands.refused(sensitivity, packed, f"--out={tmp_path}")
    assert "is quantized already" in line and len(list(tmp_path.iterdir())) == 1


def test_a_width_or_library_that_a_scheme_lacks(
    softpick: Path,
    texts: list[str],
    tmp_path: Path,
    commands: Commands,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With schemes like those of libraries that are not installed here."""
    rtn = SCHEMES["rtn"]
    few = dataclasses.replace(rtn, name="few", bits=range(4, 9, 4))
    lacking = dataclasses.replace(rtn, name="lacking", library="no_such_library")
    monkeypatch.setitem(SCHEMES, "few", few)
    monkeypatch.setitem(SCHEMES, "lacking", lacking)
    argv = [str(softpick), *texts, f"--out={tmp_path}", "--bits", "3", "4", "--schemes"]
    assert commands.refused(sweep, *argv, "few").endswith(
        "scheme few cannot do 3 bits: it has 4, 8"
    )
    line = commands.refused(sweep, *argv, "lacking")
    assert "needs the library no_such_library, which is not installed" in line


def test_jobs_fit_into_memory(softpick: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    free = psutil.virtual_memory()._replace(available=3 * runner.WORKER_BYTES)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert runner.affordable(8, [softpick]) == 2
    free = free._replace(available=0)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: free)
    assert runner.affordable(8, [softpick]) == 1


def test_no_results_to_report(tmp_path: Path, commands: Commands) -> None:
    line = commands.refused(report, f"--results={tmp_path}")
    assert "holds no results: run python -m quant.sweep" in line
    assert os.listdir(tmp_path) == []


@pytest.mark.slow  # two processes that import torch and transformers: 20 s of processor time
def test_two_jobs(softpick: Path, texts: list[str], tmp_path: Path, commands: Commands) -> None:
    argv = [str(softpick), *texts, "--what", "weights", "--bits", "2", "3", "--groups", "32"]
    command = [sys.executable, "-m", "quant.sweep", *argv, "--jobs", "2", f"--out={tmp_path}/two"]
    subprocess.run(command, cwd=ROOT, check=True, timeout=300)
    commands.run(sweep, *argv, f"--out={tmp_path}/one")
    one, two = (read_all(tmp_path / name) for name in ("one", "two"))
    assert [stored.config for stored in one] == [stored.config for stored in two]
    for a, b in zip(one, two, strict=True):
        assert a.summary.keys() == b.summary.keys()
        for name, estimate in a.summary.items():
            assert b.summary[name].value == pytest.approx(estimate.value, rel=1e-3, abs=1e-5)


@pytest.mark.integration
def test_ctrl_c_ends_in_one_line(tmp_path: Path) -> None:
    """Workers, which a terminal's Ctrl-C reaches too, say nothing; the command goes on later."""
    options = f"--bits 4 --schemes rtn --what weights --sequences 2 --length 64 --out {tmp_path}/r"
    command = [sys.executable, "-m", "quant.sweep", "checkpoints/softpick", *options.split()]
    log = tmp_path / "log"
    with log.open("wb") as output:
        process = subprocess.Popen(
            [*command, "--jobs=2"],
            cwd=ROOT,
            stdout=output,
            stderr=output,
            start_new_session=True,
            # A shell's background jobs, of which these tests may be one, ignore Ctrl-C.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        )
    while "configs to measure" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    time.sleep(2)  # the workers import
    os.killpg(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    printed = log.read_text()
    assert "Traceback" not in printed
    assert printed.splitlines()[-1].startswith("stopped; what is done is in")
