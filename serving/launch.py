"""Start vLLM and the gateway in front of it; stop both together (`make serve`).

Each runs in a process group of its own: Ctrl-C reaches only this launcher, which then ends both
groups whole, vLLM's engine processes included.
"""

import argparse
import asyncio
import contextlib
import json
import os
import re
import signal
import socket
import sys
import time
import urllib.error
import urllib.request
from asyncio.subprocess import Process
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

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
        self.log_file.parent.mkdir(parents=True, exist_ok=True)
        with self.log_file.open("wb") as log:
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
        raise self.failed(f"ended with exit code {code}", code)

    async def ready(self, path: str) -> None:
        """Wait until it answers 200 under `path`, saying now and then what it is doing."""
        began = shown = time.monotonic()
        while True:
            try:
                await asyncio.to_thread(fetch, f"{self.url}{path}")
                return
            except urllib.error.HTTPError as error:
                raise self.failed(f"answers {path} with {error.code}") from error
            except OSError:
                pass  # it does not listen yet
            if time.monotonic() - shown > 10:
                shown = time.monotonic()
                print(f"  {shown - began:3.0f} s  {last_line(self.log())[:100]}", flush=True)
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


def check_port(port: int, variable: str) -> None:
    """Stop if something already listens on `port`."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError as error:
            raise LaunchError(
                f"cannot listen on {HOST}:{port}: {error.strerror}; choose another {variable}"
            ) from None


def check_checkpoint(ckpt: str) -> None:
    """Stop if `ckpt` is not a checkpoint's folder: nothing is downloaded."""
    if not (Path(ckpt) / "config.json").is_file():
        raise LaunchError(f"CKPT={ckpt} is not a checkpoint: there is no {ckpt}/config.json")


def vllm_command(options: argparse.Namespace) -> list[str]:
    """The command line of `vllm serve`; what the user adds comes last and wins."""
    try:
        on_cpu = "cpu" in version("vllm")
    except PackageNotFoundError:
        raise LaunchError("vLLM is not installed; `make install` sets up the CPU one") from None
    command = [str(Path(sys.executable).with_name("vllm")), "serve", options.ckpt]
    command += [f"--host={HOST}", f"--port={options.vllm_port}"]
    command += [f"--served-model-name={Path(options.ckpt).resolve().name}"]
    command += CPU_ARGS if on_cpu else ()
    command += [f"--attention-backend={options.backend}"] if options.backend else []
    return command + list(options.vllm_args)


def curl_line(url: str) -> str:
    """A command that works, for the model that is really served."""
    model = json.loads(fetch(f"{url}/v1/models"))["data"][0]["id"]
    body = json.dumps({"model": model, "prompt": "It was the best of times,", "max_tokens": 32})
    return f"curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'"


async def run(vllm: Service, gateway: Service, options: argparse.Namespace) -> None:
    """Start both, say when they are ready, and wait for one of them to fail."""
    print(f"Starting vLLM with {options.ckpt} (log: {vllm.log_file})", flush=True)
    await vllm.start(vllm_command(options), {})
    gateway_environment = {
        "GATEWAY_HOST": HOST,
        "GATEWAY_PORT": str(options.gateway_port),
        "UPSTREAM_URL": vllm.url,
    }
    async with asyncio.TaskGroup() as group:
        group.create_task(vllm.ended())
        await vllm.ready("/health")
        await gateway.start([sys.executable, "-m", "serving"], gateway_environment)
        group.create_task(gateway.ended())
        await gateway.ready("/v1/models")
        curl = await asyncio.to_thread(curl_line, gateway.url)
        print(f"Ready; Ctrl-C stops it. Try:\n{curl}", flush=True)


async def serve(options: argparse.Namespace) -> None:
    """Run both until a signal comes or one of them fails; leave nothing running."""
    check_checkpoint(options.ckpt)
    if options.vllm_port == options.gateway_port:
        raise LaunchError(f"VLLM_PORT and GATEWAY_PORT are both {options.vllm_port}")
    check_port(options.vllm_port, "VLLM_PORT")
    check_port(options.gateway_port, "GATEWAY_PORT")

    vllm = Service("vllm", options.vllm_port, options.log_folder)
    gateway = Service("gateway", options.gateway_port, options.log_folder)
    running = asyncio.ensure_future(run(vllm, gateway, options))
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        asyncio.get_running_loop().add_signal_handler(number, running.cancel)
    try:
        await running
    except ExceptionGroup as failures:
        raise failures.exceptions[0] from None
    except asyncio.CancelledError:
        print("\nStopping", flush=True)
    finally:
        await gateway.stop()
        await vllm.stop()


def port_number(text: str) -> int:
    """A TCP port, for argparse."""
    port = int(text) if text.isascii() and text.isdigit() else 0
    if not 1 <= port <= 65535:
        raise argparse.ArgumentTypeError(f"{text!r} is not a port (1 to 65535)")
    return port


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="attnserve",
        description="Serve a checkpoint: vLLM, and the gateway in front of it. `attnserve doctor` "
        "checks the environment instead.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--ckpt", default="checkpoints/softpick", help="the checkpoint's folder")
    parser.add_argument(
        "--backend", default="", help="vLLM's --attention-backend; empty: by the config.json"
    )
    parser.add_argument("--vllm-port", type=port_number, default=8000, help="vLLM's port")
    parser.add_argument("--gateway-port", type=port_number, default=8080, help="the gateway's port")
    parser.add_argument(
        "--log-folder", type=Path, default=Path(".run"), help="where the two servers' logs go"
    )
    parser.add_argument(
        "vllm_args", nargs="*", metavar="-- VLLM_ARGS", help="further arguments of `vllm serve`"
    )
    return parser.parse_args(arguments)


def main() -> None:
    """Command line: exit 0 when stopped by a signal, else with one line that says why."""
    if sys.argv[1:2] == ["doctor"]:
        from serving import doctor  # it builds on this module

        sys.exit(doctor.main(sys.argv[2:]))
    try:
        asyncio.run(serve(parse()))
    except LaunchError as error:
        print(f"attnserve: {error}", file=sys.stderr)
        sys.exit(error.code)


if __name__ == "__main__":
    main()
