"""The list that `python -m PACKAGE` prints."""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Sequence
from pathlib import Path


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
