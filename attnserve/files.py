"""Where a checkout's files are, and how a file is written: whole or not at all."""

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from attnserve.errors import UserError

CHECKOUT = Path(__file__).resolve().parents[1]
"""The folder of the checkout; where attnserve was installed from a wheel, site-packages."""


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a path beside `path` to write a file or make a folder at, which becomes `path` at the
    end; after an error `path` is what it was.

    Raises:
        OSError: it cannot be written.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        temporary.unlink(missing_ok=True)


def check_writable(out: Path) -> None:
    """Check that a file or folder can be made, before the work that fills it.

    Raises:
        UserError: it cannot.
    """
    above = next(parent for parent in out.absolute().parents if parent.exists())
    if not (above.is_dir() and os.access(above, os.W_OK)):
        raise UserError(f"{out} cannot be written, since {above} cannot: name another folder")


def write_text(path: Path, text: str) -> None:
    """Write a UTF-8 file whole, or leave what was there.

    Raises:
        OSError: it cannot be written.
    """
    with replacing(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def json_lines(values: dict[str, Any]) -> str:
    """Return a JSON object with one line an entry, which diffs well and does not fill pages."""
    return (
        "{\n" + ",\n".join(f" {json.dumps(k)}: {json.dumps(v)}" for k, v in values.items()) + "\n}"
    )


def json_list(values: Iterable[Any]) -> str:
    """Return a JSON array with one line an entry."""
    return "[\n" + ",\n".join(f" {json.dumps(value)}" for value in values) + "\n]"


def json_parts(parts: dict[str, str]) -> str:
    """Return a JSON object of entries that are JSON already."""
    return "{\n" + ",\n".join(f'"{name}": {part}' for name, part in parts.items()) + "\n}\n"


class Journal:
    """Measured values by name, a JSON line each, after a line that says what they depend on.

    It is whole after a kill at any moment: a line that one cut short is left out.
    """

    def __init__(self, file: Path, key: dict[str, Any], force: bool = False) -> None:
        self.file = file
        lines = [] if force or not file.exists() else file.read_text().splitlines(keepends=True)
        try:
            whole = [json.loads(line) for line in lines if line.endswith("\n")]
            differing = ", ".join(name for name in key if whole and key[name] != whole[0].get(name))
            self.values: dict[str, Any] = dict(whole[1:])
        except (ValueError, TypeError, AttributeError):
            raise UserError(
                f"{file} is no list of measured values: --force writes it anew"
            ) from None
        if whole and whole[0] != key:
            raise UserError(
                f"{file} has values that differ in {differing}: --force measures again, --out DIR "
                "writes elsewhere"
            )
        write_text(file, "".join(json.dumps(line) + "\n" for line in (key, *self.values.items())))

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """Return a value; if it is not there, call `measure()` and keep what it gives."""
        if name not in self.values:
            self.values[name] = measure()
            with self.file.open("a") as file:
                file.write(json.dumps([name, self.values[name]]) + "\n")
        return self.values[name]
