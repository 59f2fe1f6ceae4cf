"""Server-sent events: cut a stream where events end, and read its usage on the way."""

import json
import re
from typing import Any

from serving.openai.errors import normalise

END = re.compile(rb"\r?\n\r?\n")
LONGEST = 4 * 1024 * 1024
"""Bytes; an unfinished event above this goes on as it is."""

PROMPT = re.compile(rb'"prompt_tokens"\s*:\s*(\d{1,12})')
ANSWER = re.compile(rb'"completion_tokens"\s*:\s*(\d{1,12})')


def usage_of(body: bytes) -> tuple[int, int] | None:
    """Tokens of prompt and answer by an answer's last `usage`; None if it has none."""
    at = body.rfind(b'"usage"')
    if at < 0 or not (prompt := PROMPT.search(body, at)):
        return None
    answer = ANSWER.search(body, at)
    return int(prompt[1]), int(answer[1]) if answer else 0


class Events:
    """A stream of events on its way through: whole events go on at once, nothing else is kept."""

    def __init__(self, hide_usage: bool) -> None:
        self.hide_usage = hide_usage
        self.count = 0
        """Events with tokens so far; the tokens of a stream that ends before its usage comes."""
        self.usage: tuple[int, int] | None = None
        self.error: bytes | None = None
        """The last event that was an error, in OpenAI's shape."""
        self.error_status = 500
        """Its HTTP status, by vLLM's `code`."""
        self._rest = b""

    def feed(self, piece: bytes) -> tuple[bytes, bool]:
        """What can go on of all that has come, and whether there are tokens in it."""
        if self._rest:
            piece = self._rest + piece
            self._rest = b""
        if not piece.endswith(b"\n\n"):
            piece = self._cut(piece)
        # The beginnings of the two events that are not tokens; one search each, for every piece.
        if b'"usage"' in piece or b'data: {"error"' in piece:
            return self._look(piece)
        events = piece.count(b"data: {")
        self.count += events
        return piece, events > 0

    def left(self) -> bytes:
        """The unfinished event at a stream's end."""
        return self._rest

    def _cut(self, piece: bytes) -> bytes:
        """Keep what comes after the last whole event."""
        lf, crlf = piece.rfind(b"\n\n"), piece.rfind(b"\r\n\r\n")
        end = max(lf + 2 if lf >= 0 else 0, crlf + 4 if crlf >= 0 else 0)
        if len(piece) - end > LONGEST:
            end = len(piece)
        self._rest = piece[end:]
        return piece[:end]

    def _look(self, piece: bytes) -> tuple[bytes, bool]:
        """Events one by one: note usage, hide it if it was not asked for, bring errors in shape."""
        kept = []
        tokens = 0
        at = 0
        while at < len(piece):
            end = found.end() if (found := END.search(piece, at)) else len(piece)
            event = piece[at:end]
            at = end
            data = parsed(event)
            if data is None:
                kept.append(event)
                continue
            usage = data.get("usage")
            if isinstance(usage, dict):
                self.usage = usage_of(event) or self.usage
                if data.get("choices") == []:
                    if not self.hide_usage:
                        kept.append(event)
                    continue
            if "error" in data:
                self.error_status = status_of(data["error"])
                self.error = normalise(event.strip()[5:], self.error_status)
                event = b"data: %b\n\n" % self.error
            else:
                tokens += 1
            kept.append(event)
        self.count += tokens
        return b"".join(kept), tokens > 0


def status_of(error: Any) -> int:
    """The HTTP status that an event's error would have had as an answer; 500 if it does not say."""
    code = error.get("code") if isinstance(error, dict) else None
    return code if type(code) is int and 400 <= code < 600 else 500


def parsed(event: bytes) -> dict[str, Any] | None:
    """The JSON object in an event; None if that is not what is in it."""
    data = event.strip().removeprefix(b"data:").strip()
    if not data.startswith(b"{"):
        return None
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
