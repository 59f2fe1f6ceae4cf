"""What `python -m PACKAGE` does: it lists the commands of the package."""

from __future__ import annotations

import ast
import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path


def list_commands(package: str, about: str, modules: Sequence[str]) -> None:
    """Print the commands of a package.

    Args:
        package: its name.
        about: a sentence that says what it is for.
        modules: its commands.

    Raises:
        SystemExit: with code 2, if the command line has arguments: the package is no command.
    """
    print(f"{about} Commands, each with --help:")
    print(command_list(modules))
    if sys.argv[1:] not in ([], ["--help"], ["-h"]):
        line = f"python -m {package}: {sys.argv[1]!r} is no command: use one of these"
        print(line, file=sys.stderr)
        sys.exit(2)


def command_list(modules: Sequence[str]) -> str:
    """Return a line for each module that is a command: how to call it, and the first sentence of
    its docstring. Nothing of theirs is run."""
    rows = [(f"python -m {module}", _summary(module)) for module in modules]
    width = max(len(command) for command, _ in rows)
    return "\n".join(f"  {command:{width}}  {summary}" for command, summary in rows)


def _summary(module: str) -> str:
    spec = importlib.util.find_spec(module)
    assert spec is not None and spec.origin is not None, module
    file = Path(spec.origin)
    if file.name == "__init__.py":
        file = file.with_name("__main__.py")
    text = ast.get_docstring(ast.parse(file.read_text(encoding="utf-8"))) or ""
    return " ".join(text.partition("\n\n")[0].split())
