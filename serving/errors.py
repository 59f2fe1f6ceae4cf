"""Errors in the shape OpenAI's clients expect: {"error": {"message", "type", "param", "code"}}."""

import json
from http import HTTPStatus
from typing import Any


def error_body(
    message: str, kind: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """The body of an error; `kind` is its `type`."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def kind_of(status: int) -> str:
    """OpenAI's name for the errors of an HTTP status."""
    return "server_error" if status >= 500 else "invalid_request_error"


def normalise(body: bytes, status: int) -> bytes:
    """An upstream's error body in OpenAI's shape.

    vLLM's own bodies have it but for `code`, where it puts the HTTP status: that becomes null, or
    "model_not_found" for a model it does not serve. Anything else is wrapped.
    """
    try:
        parsed = json.loads(body)
    except ValueError:
        parsed = None
    error = parsed.get("error") if isinstance(parsed, dict) else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        code, param = error.get("code"), error.get("param")
        if not isinstance(code, str):
            code = "model_not_found" if (status, param) == (404, "model") else None
        kind = error.get("type") or kind_of(status)
        whole = error_body(error["message"], kind, code, param)
    else:
        text = body.decode(errors="replace").strip()
        whole = error_body(text or HTTPStatus(status).phrase, kind_of(status))
    return json.dumps(whole).encode()
