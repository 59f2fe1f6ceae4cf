"""The command `attnserve`: all that users run, under one name.

It stands above the packages whose commands it names; nothing imports it.
"""

from importlib.metadata import version
from typing import Annotated

import typer

from attnserve import command
from attnserve.budgets.command import budgets
from attnserve.evaluation.books import books
from attnserve.evaluation.evaluate import evaluate
from attnserve.look.command import look
from attnserve.tune.command import tune
from quant.convert import convert
from quant.quantize import quantize
from quant.sweep import sweep
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


command.add(app, "serve", serve, others=True)
command.add(app, "gateway", gateway)
app.add_typer(keys, name="keys")
command.add(app, "doctor", doctor)
command.add(app, "tune", tune)
command.add(app, "quantize", quantize)
command.add(app, "convert", convert)
command.add(app, "sweep", sweep)
command.add(app, "budgets", budgets)
command.add(app, "evaluate", evaluate)
command.add(app, "look", look)
command.add(app, "books", books)


def main() -> None:
    """Run the command line: exit code 2 and one line where it makes no sense."""
    command.run(app, "attnserve")
