"""make serve: both servers come up, the printed line works, and nothing is left afterwards."""

import contextlib
import io
import itertools
import os
import re
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
from rich.console import Console

from serving.launch.progress import Progress
from serving.launch.vllm_log import IMPORTING, PHASES, last_error, notes, phase, plain_lines
from tests.servers import COMMON_ENV, STARTUP_SECONDS, end_group, free_port
from tests.serving.standin import wait_for

pytestmark = pytest.mark.integration

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def started(tmp_path: Path) -> Iterator["Started"]:
    """Yield a way to start the launcher; ended with all it started, whatever the test found."""
    launcher = Started(tmp_path)
    yield launcher
    launcher.clean_up()


def group_of(process: psutil.Process) -> int:
    """Return the process group of a process; 0 if it has ended meanwhile."""
    with contextlib.suppress(ProcessLookupError):
        return os.getpgid(process.pid)
    return 0


class Started:
    """A launcher's process, its output and the process groups seen below it."""

    def __init__(self, folder: Path) -> None:
        self.output_file = folder / "output"
        self.ports = (free_port(), free_port())
        self.groups: set[int] = set()

    def start(self, command: list[str], **env: str) -> None:
        """Start `command` from the project's folder in a process group of its own."""
        with self.output_file.open("wb") as output:
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                env={**os.environ, **COMMON_ENV, **env},
                start_new_session=True,
            )

    def launch(self, ckpt: Path | str, *vllm_args: str, folder: Path, **env: str) -> None:
        """Start the launcher itself."""
        vllm_port, gateway_port = self.ports
        command = [sys.executable, "-m", "attnserve", "serve", str(ckpt)]
        command += [f"--vllm-port={vllm_port}", f"--gateway-port={gateway_port}"]
        self.start([*command, f"--log-folder={folder}", "--", *vllm_args], **env)

    def output(self) -> str:
        """Return what it has printed."""
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
            self.groups.add(group_of(process))
        self.groups.discard(0)
        return self.survivors()

    def survivors(self) -> list[psutil.Process]:
        """Return the processes that run in the groups that were noted."""
        return [
            p
            for p in psutil.process_iter(["status"])
            if p.info["status"] != psutil.STATUS_ZOMBIE and group_of(p) in self.groups
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
    printed = started.wait_for("}'\n")  # after an install, where that was needed
    *phases, curl = re.split(r"^(?=\[ *\d+ s\] starting vLLM)", printed, flags=re.M)[
        -1
    ].splitlines()
    check_phases(phases)
    answer = subprocess.run(shlex.split(curl), capture_output=True, text=True, timeout=60)
    assert f'"model":"{tiny_llama.name}"' in answer.stdout
    assert len(started.note_groups()) >= 5  # make, the launcher, vLLM, its engine, the gateway
    assert len(started.groups) == 5  # two of them are the guards'

    started.process.terminate()  # SIGTERM to make alone
    started.process.wait(60)
    assert started.survivors() == []
    for port in started.ports:
        with socket.socket() as probe:
            assert probe.connect_ex(("127.0.0.1", port)) != 0


def check_phases(printed: list[str]) -> None:
    """Named phases with the elapsed time, of which a quick one may have been missed, and no log."""
    stamped = [line for line in printed if re.match(r"\[ *\d+ s\] \S", line)]
    assert len(stamped) == len(printed), printed
    shown = [line[len("[   0 s] ") :] for line in stamped]
    assert f"vllm: {IMPORTING}" in shown and f"gateway: {IMPORTING}" in shown
    vllm = [f"vllm: {text}" for _, text in PHASES]
    assert sum(line in shown for line in vllm) >= 3, printed


def test_ctrl_c_during_start_up_leaves_nothing(started: Started, tiny_llama: Path) -> None:
    make_serve(started, tiny_llama)
    started.wait_for(IMPORTING)
    # make, the launcher, vLLM and its engine
    wait_for(lambda: len(started.note_groups()) >= 4, "the engine starts", STARTUP_SECONDS)
    os.killpg(started.process.pid, signal.SIGINT)  # to make and the launcher, as a terminal does
    started.process.wait(60)
    assert "] stopping" in started.output()
    assert "Traceback" not in started.output()
    assert started.survivors() == []


@pytest.mark.parametrize("shown", [IMPORTING, "}'\n"], ids=["starting", "ready"])
def test_a_killed_launcher_leaves_nothing(
    started: Started, tiny_llama: Path, tmp_path: Path, shown: str
) -> None:
    started.launch(tiny_llama, "--max-model-len=64", "--dtype=float32", folder=tmp_path)
    started.wait_for(shown)
    wait_for(lambda: len(started.note_groups()) >= 4, "the engine starts", STARTUP_SECONDS)
    started.process.kill()
    started.process.wait()
    wait_for(lambda: started.survivors() == [], "its servers and their guards end", 60)


def test_a_killed_gateway_ends_all(started: Started, tiny_llama: Path, tmp_path: Path) -> None:
    started.launch(tiny_llama, "--max-model-len=64", "--dtype=float32", folder=tmp_path)
    started.wait_for("}'\n")
    started.note_groups()
    (gateway,) = (p for p in started.survivors() if p.cmdline()[-2:] == ["-m", "serving"])
    gateway.kill()
    assert started.process.wait(60) != 0
    assert "gateway ended with SIGKILL" in started.output()
    assert started.survivors() == []


def test_vllm_that_fails_is_reported(started: Started, tiny_llama: Path, tmp_path: Path) -> None:
    started.launch(tiny_llama, "--max-model-len=many", folder=tmp_path)
    assert started.process.wait(STARTUP_SECONDS) != 0
    last = started.output().splitlines()[-1]
    assert last.startswith("attnserve: vllm ended with exit code 2: vllm serve: error: argument")
    assert "many" in last
    log = Path(last.rpartition("(log: ")[2].rstrip(")"))
    assert log.parent == tmp_path and "usage: vllm serve" in log.read_text()


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
    assert started.process.wait(30) == 2
    (line,) = started.output().splitlines()
    assert line.startswith(f"attnserve: CKPT={tmp_path}/nothing is not a checkpoint")


def test_log_folder_that_cannot_be_written(
    started: Started, tiny_llama: Path, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    started.launch(tiny_llama, folder=tmp_path / "file")
    assert started.process.wait(30) == 1
    last = started.output().splitlines()[-1]
    assert last.startswith(f"attnserve: cannot write {tmp_path}/file/vllm-")
    assert last.endswith("choose another --log-folder")


def test_quoted_tilde(started: Started, tmp_path: Path) -> None:
    started.launch("~/nothing", folder=tmp_path, HOME=str(tmp_path))
    assert started.process.wait(30) == 2
    (line,) = started.output().splitlines()
    assert line.startswith(f"attnserve: CKPT={tmp_path}/nothing is not a checkpoint")


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


STARTUP_LOG = """\
Triton is installed, but doesn't include CPU backend. Disabling Triton.
(APIServer pid=8) INFO 11-27 18:34:32 [api_utils.py:286] non-default args: {'port': 18123}
(APIServer pid=8) WARNING 11-27 18:34:32 [system_utils.py:255] Found ulimit of 20000 and failed
(APIServer pid=8) INFO 11-27 18:34:41 [model.py:2152] Using max model len 512
(APIServer pid=8) WARNING 11-27 18:34:41 [vllm.py:1703] Enforce eager set, disabling torch.compile
(APIServer pid=8) INFO 11-27 18:34:41 [preflight.py:74] softpick attention, as the checkpoint's \
config.json says
(EngineCore pid=9) INFO 11-27 18:34:46 [core.py:133] Initializing a V1 LLM engine (v0.32.0) with
(Worker pid=10) INFO 11-27 18:34:54 [cpu_model_runner.py:68] Starting to load model softpick...
Compiling the softpick kernels for avx512, once on this machine, into /root/.cache/attnserve
(Worker pid=10) INFO 11-27 18:35:02 [base_loader.py:82] Initializing model took 8.511509 seconds
Loading safetensors checkpoint shards: 100% Completed | 1/1 [00:00<00:00, 175.89it/s]

(EngineCore pid=9) INFO 11-27 18:35:03 [utils.py:347] Using LBHNC KV cache layout.
(EngineCore pid=9) INFO 11-27 18:35:03 [kv_cache_utils.py:2327] CPU KV cache size: 131,072 tokens
(EngineCore pid=9) INFO 11-27 18:35:04 [core.py:402] init engine (profile, create kv cache) took 1 s
(EngineCore pid=9) WARNING 11-27 18:35:04 [vllm.py:1703] Enforce eager set, disabling torch.compile
(APIServer pid=8) INFO 11-27 18:35:04 [entry.py:136] Supported tasks: ['generate']
INFO:     Started server process [8]
"""


def test_phases_of_a_log() -> None:
    """Of a real one, in order; what comes between two lines does not change the phase."""
    lines = STARTUP_LOG.splitlines()
    seen = [phase(plain_lines("\n".join(lines[:n]))) for n in range(len(lines) + 1)]
    assert [text for text, _ in itertools.groupby(seen)] == [
        "importing Python packages",
        "reading the checkpoint's configuration",
        "starting the engine",
        "starting the worker",
        "building the model",
        "compiling CPU kernels, once on this machine",
        "loading the weights",
        "reserving the KV cache",
        "warming up",
        "starting the API server",
    ]


def test_notes_are_the_plugins_own() -> None:
    slow = "attnserve: softpick attention runs in torch operations, many times slower than CPU"
    log = STARTUP_LOG + f"{slow}\n(Worker pid=10) WARNING 11-27 18:35:02 [x.py:1] {slow}\n"
    assert notes(plain_lines(log)) == [
        "softpick attention, as the checkpoint's config.json says",
        slow,
    ]


def shown(*, terminal: bool) -> list[str]:
    """Return what a start prints, with escape sequences."""
    output = io.StringIO()
    console = Console(file=output, force_terminal=terminal, width=60, highlight=False, markup=False)
    progress = Progress(console)
    for text in ("one", "one", "two"):
        progress.now(text)
        progress.note("[b]eware")
    progress.close()
    progress.say("ready")
    return output.getvalue().splitlines()


def test_progress_without_a_terminal() -> None:
    assert shown(terminal=False) == [
        "[   0 s] one",
        "         [b]eware",
        "[   0 s] two",
        "[   0 s] ready",
    ]


def test_progress_on_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A line that moves is erased; a line for each phase stays."""
    monkeypatch.setenv("TERM", "xterm-256color")
    lines = [re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line) for line in shown(terminal=True)]
    still = [line.split("\r")[-1] for line in lines]
    assert [line for line in still if line.startswith("[")] == [
        "[   0 s] one",
        "[   0 s] two",
        "[   0 s] ready",
    ]
    assert not any("torch" in line for line in lines)
