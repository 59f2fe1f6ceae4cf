"""Real vLLM servers for tests: start one, wait until it answers, end it with all its children."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

STARTUP_SECONDS = 600
"""Longest wait for a server to come up: 30 s on an idle 2-core machine, more on a busy one."""

COMMON_ARGS = (
    "--host=127.0.0.1",
    "--enforce-eager",  # compiling takes minutes
    "--kv-cache-memory-bytes=64M",
)

COMMON_ENV = {
    "HF_HUB_OFFLINE": "1",
    "VLLM_NO_USAGE_STATS": "1",
    "VLLM_LOGGING_LEVEL": "INFO",  # tests read the lines that say what was chosen
    "DO_NOT_TRACK": "1",
    # Several servers may run at once; the default binds each of them to the same core.
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
}


@dataclass(frozen=True)
class Server:
    """A running server: its address without a slash at the end, its process id and its log."""

    url: str
    pid: int
    log_file: Path

    def log(self) -> str:
        """Everything it has printed so far."""
        return self.log_file.read_text(errors="replace")


def free_port() -> int:
    """Return a TCP port of 127.0.0.1 that nothing listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def end_group(process: subprocess.Popen[bytes], grace: float = 15.0) -> None:
    """End `process` and its whole process group: ask first, then kill what is left."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGTERM)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(grace)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def spawn(
    command: list[str], log_file: Path, env: Mapping[str, str] | None = None
) -> subprocess.Popen[bytes]:
    """Start `command` in a process group of its own, its output going to `log_file`."""
    with log_file.open("wb") as log:
        return subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, **COMMON_ENV, **(env or {})},
            start_new_session=True,
        )


def wait_until_healthy(
    url: str,
    process: subprocess.Popen[bytes],
    log_file: Path,
    timeout: float = STARTUP_SECONDS,
    path: str = "/health",
) -> None:
    """Wait until `url` answers 200 under `path`; raise with the log's end if it ends or fails."""
    deadline = time.monotonic() + timeout
    while True:
        if process.poll() is not None:
            why = f"ended with exit code {process.returncode}"
            break
        try:
            urllib.request.urlopen(f"{url}{path}", timeout=5).close()
            return
        except urllib.error.HTTPError as error:  # vLLM is up, its engine is dead
            why = f"answered {path} with {error.code}"
            break
        except OSError:  # nothing listens yet
            pass
        if time.monotonic() > deadline:
            why = f"gave no answer within {timeout:.0f} s"
            break
        time.sleep(0.2)
    tail = "\n".join(log_file.read_text(errors="replace").splitlines()[-40:])
    raise RuntimeError(f"the server at {url} {why}; its log ends:\n{tail}")


def vllm_command(ckpt: str | Path, *args: str, port: int) -> list[str]:
    """Return the command line of `vllm serve` from the environment the tests run in."""
    vllm = Path(sys.executable).with_name("vllm")
    return [str(vllm), "serve", str(ckpt), *COMMON_ARGS, f"--port={port}", *args]


@contextlib.contextmanager
def vllm_server(
    ckpt: str | Path,
    *args: str,
    port: int | None = None,
    env: Mapping[str, str] | None = None,
    timeout: float = STARTUP_SECONDS,
) -> Iterator[Server]:
    """`vllm serve ckpt *args`, ready to answer; `args` come after COMMON_ARGS and override them."""
    port = port or free_port()
    url = f"http://127.0.0.1:{port}"
    with tempfile.TemporaryDirectory(prefix="vllm-") as folder:
        log_file = Path(folder) / "server.log"
        process = spawn(vllm_command(ckpt, *args, port=port), log_file, env)
        try:
            wait_until_healthy(url, process, log_file, timeout)
            yield Server(url, process.pid, log_file)
        finally:
            end_group(process)


def failed_start(
    ckpt: str | Path,
    *args: str,
    env: Mapping[str, str] | None = None,
    timeout: float = STARTUP_SECONDS,
) -> tuple[int, str]:
    """Exit code and output of a `vllm serve` that must stop by itself at start-up."""
    with tempfile.TemporaryDirectory(prefix="vllm-") as folder:
        log_file = Path(folder) / "server.log"
        process = spawn(vllm_command(ckpt, *args, port=free_port()), log_file, env)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"vllm serve {ckpt} {args} did not stop at start-up") from None
        finally:
            end_group(process)
        return code, log_file.read_text(errors="replace")
