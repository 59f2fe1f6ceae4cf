"""Log lines as JSON, one object a line, on stderr. No line has a key, a prompt or an answer."""

import json
import logging
import sys
import time
from typing import Any

RENDERED = {"message", "asctime", "color_message"}


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
        # Asked here, not at import: a library (vLLM does) may change what every record carries.
        standard = RENDERED.union(vars(logging.makeLogRecord({})))
        line |= {k: v for k, v in record.__dict__.items() if k not in standard and v is not None}
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


def configure(level: str) -> None:
    """Write the gateway's and uvicorn's lines this way."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    root = logging.getLogger()
    root.handlers = [handler]
    root.setLevel(logging.WARNING)
    logging.getLogger("uvicorn.error").setLevel(logging.INFO)
    logging.getLogger("attnserve").setLevel(level.upper())
