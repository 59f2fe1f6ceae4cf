"""The command `attnserve`: all that users run, under one name.

It stands above the packages whose commands it names; nothing imports it.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import typer

from attnserve import command
from attnserve.command import expanded
from attnserve.errors import UserError
from attnserve.evaluation.books import books
from attnserve.files import CHECKOUT
from quant.quantize import quantize
from quant.sweep import sweep

DEFAULT_CHECKPOINT = Path("checkpoints/softpick")

app = command.application(
    "Serve attention that is not softmax, by unmodified vLLM. "
    "`attnserve COMMAND --help` says what a command takes.",
    completion=True,
)


@app.callback(invoke_without_command=True)
def show_version(
    context: typer.Context,
    wanted: Annotated[bool, typer.Option("--version", help="Print the version and exit.")] = False,
) -> None:
    """Answer what names no command."""
    if wanted:
        print(version("attnserve"))
    elif context.invoked_subcommand is None:
        print(context.get_help())
        raise typer.Exit(2)


def checkpoint_folder(named: Path | None) -> Path:
    """Return the checkpoint to serve: the one named (`~` may be quoted), else the bundled one."""
    if named is not None:
        return expanded(named)
    for base in (Path(), CHECKOUT):
        if (base / DEFAULT_CHECKPOINT / "config.json").is_file():
            return base / DEFAULT_CHECKPOINT
    raise UserError(
        f"name a checkpoint's folder: attnserve serve CKPT (there is no {DEFAULT_CHECKPOINT} here)"
    )


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
    vllm_port: Annotated[
        int, typer.Option(metavar="PORT", min=1, max=65535, help="vLLM's TCP port.")
    ] = 8000,
    gateway_port: Annotated[
        int, typer.Option(metavar="PORT", min=1, max=65535, help="The gateway's TCP port.")
    ] = 8080,
    log_folder: Annotated[
        Path, typer.Option(metavar="FOLDER", help="Where the two servers' logs go.")
    ] = Path(".run"),
) -> None:
    """Serve a checkpoint: vLLM, and the gateway in front of it.

    Ctrl-C stops both. What follows -- goes to `vllm serve`.
    """
    from serving.launch import serve as launch
    from serving.launch.process import LaunchError

    options = launch.Options(
        checkpoint_folder(ckpt),
        backend,
        vllm_port,
        gateway_port,
        expanded(log_folder),
        tuple(context.args),
    )
    try:
        asyncio.run(launch.serve(options))
    except LaunchError as error:
        command.fail("attnserve", str(error), error.code)


def gateway(context: typer.Context) -> None:
    """Run the gateway alone, in front of servers that run."""
    from serving.__main__ import main

    main(context.obj, "attnserve gateway")


def keys(context: typer.Context) -> None:
    """Make a key for a client of the gateway: keys new NAME."""
    from serving.__main__ import main

    main(["keys", *context.obj], "attnserve")


def doctor(context: typer.Context) -> None:
    """Check this environment and say what to do."""
    from serving.launch.doctor import main

    raise typer.Exit(main(context.obj))


def module(name: str, extra: str, text: str) -> Callable[[typer.Context], None]:
    """Return a command that runs `python -m NAME` in place of this process."""

    def run(context: typer.Context) -> None:
        if names := command.missing(extra):
            raise UserError(f"{', '.join(names)} not installed: pip install 'attnserve[{extra}]'")
        # -P: a folder in the present one that has the name of a package must not win over it.
        os.execv(sys.executable, [sys.executable, "-P", "-m", name, *context.obj])

    run.__doc__ = text
    return run


HANDED_ON = {
    "gateway": gateway,
    "keys": keys,
    "doctor": doctor,
    "budgets": module(
        "attnserve.budgets", "train", "Find KV budgets for a checkpoint with selective attention."
    ),
    "evaluate": module(
        "attnserve.evaluation.evaluate", "train", "Measure a checkpoint's perplexity."
    ),
}
"""Commands that read their arguments themselves, `--help` too."""

command.add(app, "serve", serve, others=True)
for _name in ("gateway", "keys", "doctor"):
    app.command(_name)(HANDED_ON[_name])
command.add(app, "quantize", quantize)
command.add(app, "sweep", sweep)
for _name in ("budgets", "evaluate"):
    app.command(_name)(HANDED_ON[_name])
command.add(app, "books", books)


def main() -> None:
    """Run the command line: exit code 2 and one line where it makes no sense."""
    given = sys.argv[1:]
    if given and given[0] in HANDED_ON:
        app(given[:1], prog_name="attnserve", obj=given[1:])
    command.run(app, "attnserve", given)
