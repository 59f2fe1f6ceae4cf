"""How commands are made: typed functions, read by typer.

The module of a command imports nothing heavy at its top, so that help is there at once; the
function imports what it needs. It raises `UserError` for what it refuses. Its docstring is its
help: paragraphs that are indented stay as they are, and what follows a form feed is left out.
"""

import dataclasses
import functools
import inspect
import os
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import Annotated, Any, NoReturn, get_type_hints

import typer
from packaging.requirements import Requirement
from typer.core import TyperCommand
from typer.exceptions import TyperException

from attnserve.errors import UserError

Function = Callable[..., Any]

INTERRUPTED = 130  # exit code after Ctrl-C, as shells have it


def expanded(path: str | Path) -> Path:
    """Return a path whose `~`, which may have been quoted, is a home folder's."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        user = Path(path).parts[0].removeprefix("~")
        raise UserError(f"there is no user {user}: {path}") from None


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON object and nothing else.")]
"""An option of every command that prints results."""


class Command(TyperCommand):
    """A command whose list options take several values at once: `--bits 2 3 4 8`.

    Where it allows extra arguments, `context.args` are those after `--`, as they are.
    """

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        others: list[str] = []
        if ctx.allow_extra_args and "--" in args:
            at = args.index("--")
            args, others = args[:at], args[at + 1 :]
        ctx.allow_extra_args = False
        super().parse_args(ctx, self._repeated(args))
        ctx.args = others
        return others

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:  # of which typer would make an exit without a word
            fail(ctx.command_path, "interrupted", INTERRUPTED)

    def _repeated(self, args: Sequence[str]) -> list[str]:
        """Return `--bits 2 3` as `--bits 2 --bits 3`."""
        lists = {name for option in self.params if option.multiple for name in option.opts}
        result: list[str] = []
        current, values = "", 0
        for argument in args:
            if argument.startswith("-") and argument != "-":
                name, equals, _ = argument.partition("=")
                current, values = (name if name in lists else ""), int(bool(equals))
            elif current:
                if values:
                    result.append(current)
                values += 1
            result.append(argument)
        return result


def missing(extra: str) -> list[str]:
    """Return the distributions of an extra that are not installed; none is known of a checkout on
    PYTHONPATH."""
    try:
        known = requires("attnserve") or []
    except PackageNotFoundError:
        return []
    names = []
    for requirement in map(Requirement, known):
        if requirement.marker is not None and requirement.marker.evaluate({"extra": extra}):
            try:
                version(requirement.name)
            except PackageNotFoundError:
                names.append(requirement.name)
    return names


def needs(extra: str) -> Callable[[Function], Function]:
    """Return a decorator of a command that works only where an extra is installed."""

    def decorate(function: Function) -> Function:
        @functools.wraps(function)
        def run(*arguments: Any, **options: Any) -> Any:
            if names := missing(extra):
                raise UserError(
                    f"{', '.join(names)} not installed: pip install 'attnserve[{extra}]'"
                )
            return function(*arguments, **options)

        return run

    return decorate


def options_of(*kinds: type[Any]) -> Callable[[Function], Function]:
    """Return a decorator that gives a command an option for each field of dataclasses.

    The fields' annotations are typer's, and all have defaults; the options replace the command's
    parameters of these types, which get the values.
    """

    def decorate(function: Function) -> Function:
        signature = inspect.signature(function, eval_str=True)
        keyword = inspect.Parameter.KEYWORD_ONLY
        holders, parameters = {}, []
        for parameter in signature.parameters.values():
            if parameter.annotation not in kinds:
                parameters.append(parameter.replace(kind=keyword))
                continue
            kind = holders[parameter.name] = parameter.annotation
            hints = get_type_hints(kind, include_extras=True)
            parameters += [
                inspect.Parameter(name, keyword, default=default, annotation=hints[name])
                for name, default in vars(kind()).items()
            ]

        @functools.wraps(function)
        def run(**given: Any) -> Any:
            for name, kind in holders.items():
                fields = [field.name for field in dataclasses.fields(kind)]
                given[name] = kind(**{field: given.pop(field) for field in fields})
            return function(**given)

        vars(run)["__signature__"] = signature.replace(parameters=parameters)
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        return run

    return decorate


def add(app: typer.Typer, name: str, function: Function, others: bool = False) -> None:
    """Add a command; what follows `--` is handed to it as `context.args` if it takes `others`."""
    text = (inspect.getdoc(function) or "").partition("\f")[0].strip()
    paragraphs = text.split("\n\n")
    app.command(
        name,
        cls=Command,
        help="\n\n".join("\b\n" + p if p.startswith("  ") else p for p in paragraphs),
        short_help=" ".join(paragraphs[0].split()),
        context_settings={"allow_extra_args": others, "help_option_names": ["--help", "-h"]},
    )(function)


def application(help_text: str | None = None, completion: bool = False) -> typer.Typer:
    """Return an application without commands, in plain text."""
    return typer.Typer(
        help=help_text,
        add_completion=completion,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
    )


def run(app: typer.Typer, name: str, arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command line (None: this process's) to its end; `name` begins every message.

    Raises:
        SystemExit: always: with 0; with 2 and one line on standard error where the input makes no
            sense; or with what the command says.
    """
    given = list(sys.argv[1:] if arguments is None else arguments)
    try:
        code = app(given, prog_name=name, standalone_mode=False)
    except TyperException as error:
        context = getattr(error, "ctx", None)
        path = context.command_path if context is not None else name
        fail(path, f"{error.format_message().rstrip('.')} ({hint(error, path, given)})", 2)
    except OSError as error:
        named = error.filename is not None and error.strerror is not None
        fail(name, f"{error.filename}: {error.strerror}" if named else str(error), 2)
    except ValueError as error:
        fail(name, " ".join(str(error).split()), 2)
    except typer.Abort:
        fail(name, "interrupted", INTERRUPTED)
    sys.exit(code)


def hint(error: TyperException, path: str, given: Sequence[str]) -> str:
    """Return what to do about a command line that cannot be read."""
    context = getattr(error, "ctx", None)
    if context is not None and context.command.context_settings.get("allow_extra_args"):
        if getattr(error, "possibilities", None) == []:  # typer's NoSuchOption is private
            return f"other options follow `--`: {path} ... -- OPTIONS"
    elif path != "attnserve" or not given:
        pass
    elif os.path.isfile(os.path.expanduser(given[0]) + "/config.json"):
        return f"to serve it: attnserve serve {given[0]}"
    return f"{path} --help"


def fail(name: str, message: str, code: int) -> NoReturn:
    print(f"{name}: {message}", file=sys.stderr)
    sys.exit(code)


def main(
    function: Function, name: str, arguments: Sequence[str] | None = None, others: bool = False
) -> NoReturn:
    """Run one function as a program of its own: `python -m quant.sweep`."""
    app = application()
    add(app, name, function, others)
    run(app, name, arguments)


def run_package(name: str, about: str, *functions: Function) -> NoReturn:
    """Run functions as commands of one program, which lists them where none is named."""
    app = application(about)
    for function in functions:
        add(app, function.__name__, function)
    run(app, name, sys.argv[1:] or ["--help"])
