"""Log lines as JSON, one object a line, on stderr. No line has a key, a prompt or an answer."""

import contextlib
import json
import logging
import sys
import time
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

RENDERED = {"message", "asctime", "color_message"}

_as_json = json.JSONEncoder(default=str).encode


class JsonLines(logging.Formatter):
    """A record and its `extra` fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line of JSON."""
        standard = standard_fields(logging.getLogRecordFactory())
        fields = {k: v for k, v in record.__dict__.items() if k not in standard}
        if record.exc_info:
            fields["exception"] = self.formatException(record.exc_info)
        return json_line(record.created, record.levelname.lower(), record.getMessage(), fields)


@lru_cache(1)
def standard_fields(_: object) -> frozenset[str]:
    """Return what every record of a factory has: a library (vLLM does) may set its own factory."""
    return frozenset(RENDERED.union(vars(logging.makeLogRecord({}))))


def json_line(at: float, level: str, message: str, fields: dict[str, Any]) -> str:
    """Return a line of a Unix time, a level, a message, and the fields that are not None."""
    line = {
        "time": f"{second_of(int(at))}.{int(at % 1 * 1000):03d}Z",
        "level": level,
        "message": message,
    }
    return _as_json(line | {name: value for name, value in fields.items() if value is not None})


@lru_cache(1)
def second_of(at: int) -> str:
    """Return a Unix time as ISO 8601 has it."""
    return time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(at))


def log_requests(lines: Iterable[tuple[float, dict[str, Any]]]) -> None:
    """Write the lines of requests, each by its Unix time and its fields, at once: logging's way of
    a record to its handler would cost more than the line."""
    text = "".join(f"{json_line(at, 'info', 'request', fields)}\n" for at, fields in lines)
    with contextlib.suppress(OSError):  # nobody reads it any more
        sys.stderr.write(text)
        sys.stderr.flush()


def configure(level: str) -> None:
    """Write the gateway's and uvicorn's lines this way."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.INFO)
    logging.getLogger("attnserve").setLevel(level.upper())
