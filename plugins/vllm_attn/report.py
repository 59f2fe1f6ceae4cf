"""Start-up errors, and how a user sees them: one line, exit code 1, no traceback.

An error in the API server's process reaches `sys.excepthook`. One in a worker or engine core is
logged there by vLLM, and every process above raises an error of its own. The first one says the
line and leaves it in a note, which tells the others that theirs are consequences.
"""

from __future__ import annotations

import atexit
import contextlib
import difflib
import logging
import multiprocessing
import os
import re
import secrets
import sys
import tempfile
from pathlib import Path
from types import TracebackType

from attn_kernels import VariantError, variant_names

ENGINE_LOGGERS = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")
"""Where an engine core and its workers log the error that ends them."""

RUN = "ATTNSERVE_RUN"
"""Environment variable: names one server's note, in all of its processes."""


class StartupError(RuntimeError):
    """The server must not start like this; the message says what to do.

    Not a ValueError: pydantic would wrap it and bury the message.
    """


def one_line(error: BaseException | None) -> str | None:
    """Return our message inside an uncaught error, or None if the error is not ours.

    Looks through the causes of an error and into pydantic's wrapping of a ValueError.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, StartupError | VariantError):
            return str(error)
        if unknown := re.match(r"Unknown attention backend: '(\w+)'", str(error)):
            return unknown_backend(unknown[1])
        if gguf := re.search(r"config file at '(.+\.gguf)' is not a valid JSON", str(error)):
            return (
                f"{gguf[1]} is a GGUF file, which vLLM does not read: python -m quant.convert "
                f"{gguf[1]} OUT writes a folder that it serves"
            )
        for detail in getattr(error, "errors", list)():
            wrapped = detail.get("ctx", {}).get("error") if isinstance(detail, dict) else None
            if isinstance(wrapped, VariantError):
                return str(wrapped)
        error = error.__cause__ or error.__context__
    return None


def unknown_backend(name: str) -> str:
    """Return the line for an `--attention-backend` that vLLM does not know (it lists fifty
    names)."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    known = [member.lower() for member in AttentionBackendEnum.__members__]
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"variants: {', '.join(variant_names())}"
    return f"unknown attention backend {name.lower()!r}; {hint}"


def note() -> Path:
    """Return the file in which a process of this server leaves its line."""
    return Path(tempfile.gettempdir()) / f"attnserve-{os.environ.get(RUN, os.getpid())}"


def said() -> str | None:
    """Return the line that another process of this server has left."""
    try:
        return note().read_text(encoding="utf-8")
    except OSError:
        return None


def say(message: str) -> None:
    """Print the line and leave it to the processes above."""
    print(f"attnserve: {message}", file=sys.stderr, flush=True)
    with contextlib.suppress(OSError):  # then vLLM's own errors follow the line
        fd = os.open(note(), os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_NOFOLLOW, 0o600)
        with open(fd, "w", encoding="utf-8") as file:
            file.write(message)


def forget() -> None:
    """Drop the line of an earlier start in this process."""
    note().unlink(missing_ok=True)


class OneLineFilter(logging.Filter):
    """Ends the process where vLLM would log the traceback of a StartupError or VariantError, or of
    what follows from one in another process."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True for every other record.

        Raises:
            SystemExit: the line is said.
        """
        if not record.exc_info:
            return True
        if message := one_line(record.exc_info[1]):
            say(message)
        elif said() is None:
            return True
        raise SystemExit(1)


def install() -> None:
    """Show a StartupError or VariantError that nobody catches as one line, in this process and in
    its engine cores and workers; leave every other error alone."""
    # A spawned process unpickles its configuration, which comes here, before it has a parent.
    spawned = "--multiprocessing-fork" in sys.orig_argv
    if not spawned and multiprocessing.parent_process() is None:
        os.environ[RUN] = secrets.token_hex(8)
        atexit.register(forget)
    for name in ENGINE_LOGGERS:
        logging.getLogger(name).addFilter(OneLineFilter())
    install_excepthook()


def install_excepthook() -> None:
    """Print an uncaught StartupError or VariantError as one line, also where vLLM's error follows
    from one in another process."""
    previous = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        message = one_line(error)
        if message is None and "Engine core initialization failed" in str(error):
            message = said()
        if message is None:
            previous(kind, error, traceback)
        else:
            print(f"attnserve: {message}", file=sys.stderr)

    sys.excepthook = hook
