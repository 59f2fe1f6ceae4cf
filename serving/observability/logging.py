"""Log lines as JSON, one object a line, on stderr. No line has a key, a prompt or an answer."""

import json
import logging
import sys
import time
from functools import lru_cache
from typing import Any

RENDERED = {"message", "asctime", "color_message"}

_as_json = json.JSONEncoder(default=str).encode


class JsonLines(logging.Formatter):
    """A record and its `extra` fields."""

    def format(self, record: logging.LogRecord) -> str:
        """Return one line of JSON."""
        at = time.gmtime(record.created)
        line: dict[str, Any] = {
            "time": f"{time.strftime('%Y-%m-%dT%H:%M:%S', at)}.{int(record.msecs):03d}Z",
            "level": record.levelname.lower(),
            "message": record.getMessage(),
        }
        standard = standard_fields(logging.getLogRecordFactory())
        line |= {k: v for k, v in record.__dict__.items() if k not in standard and v is not None}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return _as_json(line)


@lru_cache(1)
def standard_fields(_: object) -> frozenset[str]:
    """Return what every record of a factory has: a library (vLLM does) may set its own factory."""
    return frozenset(RENDERED.union(vars(logging.makeLogRecord({}))))


def log_request(log: logging.Logger, fields: dict[str, Any]) -> None:
    """Write the line of a request, without looking for the caller first, as `log.info` does."""
    log.handle(log.makeRecord(log.name, logging.INFO, "", 0, "request", (), None, extra=fields))


def configure(level: str) -> None:
    """Write the gateway's and uvicorn's lines this way."""
    # No line has these, and finding them out for each costs more than the line.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.INFO)
    logging.getLogger("attnserve").setLevel(level.upper())
