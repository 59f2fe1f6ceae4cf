"""The process of a server: started in a group of its own, watched, and ended whole.

Ctrl-C reaches only the launcher, which then ends the groups of its servers, vLLM's engine processes
included. A guard does the same where the launcher can not, because it was killed itself.
"""

import asyncio
import contextlib
import os
import signal
import urllib.error
import urllib.request
from asyncio.subprocess import Process
from collections.abc import Sequence
from pathlib import Path

from serving.launch.host_checks import port_fault
from serving.launch.progress import Progress
from serving.launch.vllm_log import FATAL, last_error, notes, phase, plain_lines

HOST = "127.0.0.1"

STOP_SECONDS = 20.0  # how long a process may take to stop when asked, before it is killed

GUARD = """
read -r launcher_is_gone
kill -TERM $0
left=$1
while [ $left -gt 0 ] && kill -0 -$0; do sleep 1; left=$((left - 1)); done
kill -KILL -$0
"""
"""Shell code that stops the process group $0, in at most $1 seconds, once the pipe on its standard
input is closed, which the end of the launcher does, whatever ended it."""

QUIET_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}


class LaunchError(Exception):
    """Why a server cannot run, in one line, and the exit code that says so."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Service:
    """A server of this machine: its process, its address and its log."""

    def __init__(self, name: str, port: int, log_folder: Path) -> None:
        self.name = name
        self.port = port
        self.url = f"http://{HOST}:{port}"
        self.log_file = log_folder / f"{name}-{port}.log"
        self.process: Process | None = None
        self._guard: Process | None = None

    async def start(self, command: Sequence[str], environment: dict[str, str]) -> None:
        """Start it in a process group of its own, its output going to its log."""
        try:
            self.log_file.parent.mkdir(parents=True, exist_ok=True)
            log = self.log_file.open("wb")
        except OSError as error:
            raise LaunchError(
                f"cannot write {self.log_file}: {error.strerror}; choose another --log-folder"
            ) from None
        with log:
            self.process = await asyncio.create_subprocess_exec(
                *command,
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=asyncio.subprocess.STDOUT,
                env=QUIET_ENVIRONMENT | os.environ | environment,
                start_new_session=True,
            )
        self._guard = await asyncio.create_subprocess_exec(
            *("sh", "-c", GUARD, str(self.process.pid), f"{STOP_SECONDS:.0f}"),
            stdin=asyncio.subprocess.PIPE,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.DEVNULL,
            start_new_session=True,
        )

    async def ended(self) -> None:
        """Wait for its process, which is not meant to end, and raise."""
        assert self.process is not None
        code = await self.process.wait()
        how = f"exit code {code}" if code >= 0 else signal.Signals(-code).name
        raise self.failed(f"ended with {how}", code)

    async def ready(self, path: str, progress: Progress | None = None) -> None:
        """Wait until it answers 200 under `path`, showing what it is doing."""
        with contextlib.closing(progress or Progress(aside=True)) as shown:
            while True:
                try:
                    await asyncio.to_thread(fetch, f"{self.url}{path}")
                    return
                except urllib.error.HTTPError as error:
                    raise self.failed(f"answers {path} with {error.code}") from error
                except OSError:
                    pass  # it does not listen yet
                log = self.log()
                lines = plain_lines(log)
                for note in notes(plain_lines(FATAL.sub("", log))):
                    shown.note(note)
                shown.now(f"{self.name}: {phase(lines)}")
                await asyncio.sleep(0.25)

    async def stop(self) -> None:
        """Ask its process to stop, and kill what is left of its group after STOP_SECONDS."""
        if self.process is None:
            return
        if self.process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self.process.terminate()
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self.process.wait(), STOP_SECONDS)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        await self.process.wait()
        if self._guard is not None:
            self._guard.kill()
            await self._guard.wait()

    def log(self) -> str:
        """Return everything it has printed."""
        return self.log_file.read_text(errors="replace")

    def failed(self, how: str, code: int = 1) -> LaunchError:
        """Return the error that says how it failed, why in its own words, and where its log is."""
        reason = last_error(self.log()).removeprefix("attnserve: ") or "no message"
        return LaunchError(f"{self.name} {how}: {reason} (log: {self.log_file})", max(code, 1))


DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens URLs of this machine, whatever http_proxy says."""


def fetch(url: str) -> bytes:
    """Return the body of a GET that answers 200; raises OSError where it does not."""
    with DIRECT.open(url, timeout=5) as response:
        content: bytes = response.read()
        return content


def check_port(port: int, option: str) -> None:
    """Raise a LaunchError if something already listens on a port, which `option` chooses."""
    if fault := port_fault(port, HOST):
        raise LaunchError(f"{fault}; choose another {option}")
