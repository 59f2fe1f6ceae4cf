"""make serve: both servers come up, the printed line works, and nothing is left afterwards."""

import os
import shlex
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from serving.launch import last_error
from tests.servers import COMMON_ENV, STARTUP_SECONDS, end_group, free_port

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def started(tmp_path: Path) -> Iterator["Started"]:
    """A way to start the launcher; ended with all it started, whatever the test found."""
    launcher = Started(tmp_path)
    yield launcher
    launcher.clean_up()


class Started:
    """A launcher's process, its output and the process groups seen below it."""

    def __init__(self, folder: Path) -> None:
        self.output_file = folder / "output"
        self.ports = (free_port(), free_port())
        self.groups: set[int] = set()

    def start(self, command: list[str]) -> None:
        """Start `command` from the project's folder in a process group of its own."""
        with self.output_file.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **COMMON_ENV},
                start_new_session=True,
            )

    def launch(self, ckpt: Path | str, *vllm_args: str, folder: Path) -> None:
        """Start the launcher itself."""
        vllm_port, gateway_port = self.ports
        command = [sys.executable, "-m", "serving.launch", f"--ckpt={ckpt}"]
        command += [f"--vllm-port={vllm_port}", f"--gateway-port={gateway_port}"]
        self.start([*command, f"--log-folder={folder}", "--", *vllm_args])

    def output(self) -> str:
        """What it has printed."""
        return self.output_file.read_text()

    def wait_for(self, text: str, timeout: float = STARTUP_SECONDS) -> str:
        """Wait until it has printed `text`; what it has printed then."""
        deadline = time.monotonic() + timeout
        while text not in self.output():
            assert self.process.poll() is None, f"it ended: {self.output()}"
            assert time.monotonic() < deadline, f"it did not print {text!r}: {self.output()}"
            time.sleep(0.2)
        return self.output()

    def note_groups(self) -> list[psutil.Process]:
        """Remember the process groups below it; the processes in them."""
        for process in psutil.Process(self.process.pid).children(recursive=True):
            self.groups.add(os.getpgid(process.pid))
        return self.survivors()

    def survivors(self) -> list[psutil.Process]:
        """The processes that run in the groups that were noted."""
        return [
            p
            for p in psutil.process_iter()
            if p.status() != psutil.STATUS_ZOMBIE and os.getpgid(p.pid) in self.groups
        ]

    def clean_up(self) -> None:
        """End what a failed test may have left."""
        if hasattr(self, "process"):
            end_group(self.process)
        for process in self.survivors():
            process.kill()


def make_serve(started: Started, ckpt: Path) -> None:
    """Start `make serve` with `ckpt` on the launcher's ports."""
    vllm_port, gateway_port = started.ports
    settings = [f"VLLM_PORT={vllm_port}", f"GATEWAY_PORT={gateway_port}", f"CKPT={ckpt}"]
    started.start(["make", "serve", *settings, "VLLM_ARGS=--max-model-len 64 --dtype float32"])


def test_make_serve_answers_and_leaves_nothing(started: Started, tiny_llama: Path) -> None:
    make_serve(started, tiny_llama)
    curl = started.wait_for("}'\n").splitlines()[-1]
    answer = subprocess.run(shlex.split(curl), capture_output=True, text=True, timeout=60)
    assert f'"model":"{tiny_llama.name}"' in answer.stdout
    assert len(started.note_groups()) >= 5  # make, the launcher, vLLM, its engine, the gateway
    assert len(started.groups) == 3

    started.process.terminate()  # SIGTERM to make alone
    started.process.wait(60)
    assert started.survivors() == []
    for port in started.ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


def test_ctrl_c_during_start_up_leaves_nothing(started: Started, tiny_llama: Path) -> None:
    make_serve(started, tiny_llama)
    started.wait_for(" s  ")  # the first line of progress: vLLM is loading
    started.note_groups()
    os.killpg(started.process.pid, signal.SIGINT)  # to make and the launcher, as a terminal does
    started.process.wait(60)
    assert "Stopping" in started.output()
    assert "Traceback" not in started.output()
    assert started.survivors() == []


def test_vllm_that_fails_is_reported(started: Started, tiny_llama: Path, tmp_path: Path) -> None:
    started.launch(tiny_llama, "--max-model-len=many", folder=tmp_path)
    assert started.process.wait(STARTUP_SECONDS) != 0
    last = started.output().splitlines()[-1]
    assert last.startswith("attnserve: vllm ended with exit code 2: vllm serve: error: argument")
    assert "many" in last


def test_taken_port_is_said_before_anything_starts(
    started: Started, tiny_llama: Path, tmp_path: Path
) -> None:
    with socket.create_server(("127.0.0.1", started.ports[1])):
        started.launch(tiny_llama, folder=tmp_path)
        assert started.process.wait(30) == 1
    (line,) = started.output().splitlines()
    assert f"127.0.0.1:{started.ports[1]}" in line
    assert "GATEWAY_PORT" in line


def test_missing_checkpoint(started: Started, tmp_path: Path) -> None:
    started.launch(tmp_path / "nothing", folder=tmp_path)
    assert started.process.wait(30) == 1
    (line,) = started.output().splitlines()
    assert line.startswith(f"attnserve: CKPT={tmp_path}/nothing is not a checkpoint")


@pytest.mark.parametrize("port", ["0", "65536", "http", "-1", "８０"])
def test_impossible_port(port: str) -> None:
    command = [sys.executable, "-m", "serving.launch", f"--vllm-port={port}"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=30)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].endswith(f"'{port}' is not a port (1 to 65535)")


ENGINE_LOG = """\
(EngineCore pid=7) ERROR 11-22 02:42:49 [core.py:1510] EngineCore failed to start.
(EngineCore pid=7) ERROR 11-22 02:42:49 [core.py:1510] Traceback (most recent call last):
(EngineCore pid=7) ERROR 11-22 02:42:49 [core.py:1510]   File "core.py", line 1, in run
(EngineCore pid=7) ERROR 11-22 02:42:49 [core.py:1510] TypeError: check() takes 1 argument
(APIServer pid=6)     raise RuntimeError(
(APIServer pid=6) RuntimeError: Engine core initialization failed. See root cause above.
nanobind: leaked 514 functions!
"""


@pytest.mark.parametrize(
    ("log", "expected"),
    [
        (ENGINE_LOG, "TypeError: check() takes 1 argument"),
        ("INFO x\nvllm serve: error: argument --a: no\n", "vllm serve: error: argument --a: no"),
        (
            "attnserve: no such variant; try softpick\nbye\n",
            "attnserve: no such variant; try softpick",
        ),
        ("Killed\n", "Killed"),
        ("", ""),
    ],
)
def test_last_error(log: str, expected: str) -> None:
    assert last_error(log) == expected
