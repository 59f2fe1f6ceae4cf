"""The command `attnserve`: all that users run, under one name.

`serve` is read here. The other commands read their own arguments, which are handed on as they are,
and nothing of theirs is imported before one of them is asked for.
"""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated, NoReturn

import typer
from packaging.requirements import Requirement
from typer.exceptions import TyperException

ROOT = Path(__file__).resolve().parent.parent
"""The checkout, if this is one."""

DEFAULT_CHECKPOINT = Path("checkpoints/softpick")

app = typer.Typer(
    help="Serve attention that is not softmax, by unmodified vLLM. "
    "`attnserve COMMAND --help` says what a command takes.",
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def fail(message: str, code: int = 1) -> NoReturn:
    """End with one line on standard error."""
    print(f"attnserve: {message}", file=sys.stderr)
    sys.exit(code)


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


def expanded(path: Path) -> Path:
    """Return a path whose `~`, which may have been quoted, is a home folder's."""
    try:
        return path.expanduser()
    except RuntimeError:
        fail(f"there is no user {path.parts[0].removeprefix('~')}: {path}", 2)


def checkpoint_folder(named: Path | None) -> Path:
    """Return the checkpoint to serve: the one named (`~` may be quoted), else the bundled one."""
    if named is not None:
        return expanded(named)
    for base in (Path(), ROOT):
        if (base / DEFAULT_CHECKPOINT / "config.json").is_file():
            return base / DEFAULT_CHECKPOINT
    fail(
        f"name a checkpoint's folder: attnserve serve CKPT (there is no {DEFAULT_CHECKPOINT} here)",
        2,
    )


@app.command(epilog="What follows -- goes to `vllm serve`.")
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
    """Serve a checkpoint: vLLM, and the gateway in front of it. Ctrl-C stops both."""
    from serving.launch import serve as launch
    from serving.launch.process import LaunchError

    options = launch.Options(
        checkpoint_folder(ckpt),
        backend,
        vllm_port,
        gateway_port,
        expanded(log_folder),
        tuple(context.obj),
    )
    try:
        asyncio.run(launch.serve(options))
    except LaunchError as error:
        fail(str(error), error.code)


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


def missing(extra: str) -> list[str]:
    """Return the distributions of an extra that are not installed."""
    names = []
    for requirement in map(Requirement, requires("attnserve") or []):
        if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
            try:
                version(requirement.name)
            except PackageNotFoundError:
                names.append(requirement.name)
    return names


def module(name: str, extra: str, text: str) -> Callable[[typer.Context], None]:
    """Return a command that runs `python -m NAME` in place of this process."""

    def run(context: typer.Context) -> None:
        if names := missing(extra):
            fail(f"{', '.join(names)} not installed: pip install 'attnserve[{extra}]'")
        # -P: a folder in the present one that has the name of a package must not win over it.
        os.execv(sys.executable, [sys.executable, "-P", "-m", name, *context.obj])

    run.__doc__ = text
    return run


HANDED_ON = {
    "gateway": gateway,
    "keys": keys,
    "doctor": doctor,
    "quantize": module("quant.quantize", "quant", "Write a checkpoint with packed weights."),
    "sweep": module("quant.sweep", "quant", "Measure what few bits cost, for checkpoints."),
    "budgets": module(
        "attnserve.budgets", "train", "Find KV budgets for a checkpoint with selective attention."
    ),
    "evaluate": module(
        "attnserve.evaluation.evaluate", "train", "Measure a checkpoint's perplexity."
    ),
    "books": module(
        "attnserve.evaluation.books", "train", "Fetch the novels that the checkpoints learned from."
    ),
}
"""Commands that read their arguments themselves, `--help` too."""

for _name, _command in HANDED_ON.items():
    app.command(_name)(_command)


def split(arguments: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the arguments that are read here, and those that are handed on as they are."""
    if arguments and arguments[0] in HANDED_ON:
        return [arguments[0]], list(arguments[1:])
    if "--" in arguments:
        at = arguments.index("--")
        return list(arguments[:at]), list(arguments[at + 1 :])
    return list(arguments), []


def main() -> None:
    """Run the command line: exit code 2 and one line where it makes no sense."""
    own, others = split(sys.argv[1:])
    try:
        code = app(own, prog_name="attnserve", obj=others, standalone_mode=False)
    except TyperException as error:
        message, hint = error.format_message().rstrip("."), "attnserve --help"
        if own[0] == "serve":
            hint = "attnserve serve --help"
            if getattr(error, "possibilities", None) == []:  # typer's NoSuchOption is private
                hint = "vLLM's options follow `--`: attnserve serve CKPT -- OPTIONS"
        elif Path(os.path.expanduser(own[0]), "config.json").exists():
            hint = f"to serve it: attnserve serve {own[0]}"
        fail(f"{message} ({hint})", error.exit_code)
    sys.exit(code)
