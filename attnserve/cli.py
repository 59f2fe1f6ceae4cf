"""The command `attnserve`: all that users run, under one name.

It stands above the packages whose commands it names; nothing imports it.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from importlib.metadata import version
from typing import Annotated

import typer

from attnserve import command
from attnserve.errors import UserError
from attnserve.evaluation.books import books
from serving.__main__ import gateway, keys
from serving.launch.doctor import doctor
from serving.launch.serve import serve

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
    "quantize": module("quant.quantize", "quant", "Write a checkpoint with packed weights."),
    "sweep": module("quant.sweep", "quant", "Measure what few bits cost, for checkpoints."),
    "budgets": module(
        "attnserve.budgets", "train", "Find KV budgets for a checkpoint with selective attention."
    ),
    "evaluate": module(
        "attnserve.evaluation.evaluate", "train", "Measure a checkpoint's perplexity."
    ),
}
"""Commands that read their arguments themselves, `--help` too."""

command.add(app, "serve", serve, others=True)
command.add(app, "gateway", gateway)
app.add_typer(keys, name="keys")
command.add(app, "doctor", doctor)
for _name, _command in HANDED_ON.items():
    app.command(_name)(_command)
command.add(app, "books", books)


def main() -> None:
    """Run the command line: exit code 2 and one line where it makes no sense."""
    given = sys.argv[1:]
    if given and given[0] in HANDED_ON:
        app(given[:1], prog_name="attnserve", obj=given[1:])
    command.run(app, "attnserve", given)
