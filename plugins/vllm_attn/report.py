"""Start-up errors, and how a user sees them: one line, exit code 1, no traceback.

An error in the API server's process reaches `sys.excepthook`. One in an engine core or worker is
logged there by vLLM, which then raises an error of its own in the API server.
"""

from __future__ import annotations

import difflib
import logging
import re
import sys
from types import TracebackType

from attn_kernels import VariantError, variant_names

STOPPED = 78
"""Exit code of an engine core that has said in one line why it does not start (sysexits.h's
EX_CONFIG). vLLM names it in the API server's error."""

ENGINE_LOGGERS = ("vllm.v1.engine.core", "vllm.v1.executor.multiproc_executor")
"""Where an engine core and its workers log the error that ends them."""


class StartupError(RuntimeError):
    """The server must not start like this; the message says what to do.

    Not a ValueError: pydantic would wrap it and bury the message.
    """


def one_line(error: BaseException | None) -> str | None:
    """Our message inside an uncaught error, or None if the error is not ours.

    Looks through the causes of an error and into pydantic's wrapping of a ValueError.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        if isinstance(error, StartupError | VariantError):
            return str(error)
        if unknown := re.match(r"Unknown attention backend: '(\w+)'", str(error)):
            return unknown_backend(unknown[1])
        for detail in getattr(error, "errors", list)():
            wrapped = detail.get("ctx", {}).get("error") if isinstance(detail, dict) else None
            if isinstance(wrapped, VariantError):
                return str(wrapped)
        error = error.__cause__ or error.__context__
    return None


def unknown_backend(name: str) -> str:
    """The line for an `--attention-backend` that vLLM does not know (it lists fifty names)."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    known = [member.lower() for member in AttentionBackendEnum.__members__]
    close = difflib.get_close_matches(name.lower(), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"variants: {', '.join(variant_names())}"
    return f"unknown attention backend {name.lower()!r}; {hint}"


class OneLineFilter(logging.Filter):
    """Ends the process where vLLM would log the traceback of a StartupError or VariantError."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Return True for every other record.

        Raises:
            SystemExit: with `STOPPED`, after the line is printed.
        """
        message = one_line(record.exc_info[1]) if record.exc_info else None
        if message is None:
            return True
        print(f"attnserve: {message}", file=sys.stderr, flush=True)
        raise SystemExit(STOPPED)


def install() -> None:
    """Print a StartupError or VariantError that nobody catches as one line, in this process and in
    its engine cores; leave every other error alone."""
    for name in ENGINE_LOGGERS:
        logging.getLogger(name).addFilter(OneLineFilter())
    install_excepthook()


def install_excepthook() -> None:
    """Print an uncaught StartupError or VariantError as one line."""
    previous = sys.excepthook

    def hook(
        kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        message = one_line(error)
        if re.search(rf"Failed core proc\(s\): .*: {STOPPED}\b", str(error)):
            return  # it has printed the line
        if message is None:
            previous(kind, error, traceback)
        else:
            print(f"attnserve: {message}", file=sys.stderr)

    sys.excepthook = hook
