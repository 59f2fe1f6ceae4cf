"""Errors in the shape OpenAI's clients expect: {"error": {"message", "type", "param", "code"}}."""

import json
import math
from http import HTTPStatus
from typing import Any, Self

UNEXPECTED = (ValueError, LookupError, TypeError, AttributeError, OverflowError, RecursionError)
"""What is raised where a server's answer is not what it should be."""

MAX_ERROR = 128 * 1024
"""Most bytes of an answer that is looked into for an error's message."""

MAX_MESSAGE = 4096
"""Most bytes of an answer in no known shape that become an error's message."""


class ApiError(Exception):
    """An answer that is an error.

    A 429 or 503 says when to try again: after `retry_after` seconds, or never if that is None.
    """

    def __init__(
        self,
        status: int,
        message: str,
        kind: str | None = None,
        code: str | None = None,
        param: str | None = None,
        retry_after: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.body = error_body(message, kind or error_type(status), code, param)
        self.retry_after = retry_after

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how to make it again in another process."""
        return ApiError, (self.status, str(self)), self.__dict__

    @classmethod
    def of_upstream(cls, status: int, body: bytes) -> Self:
        """Return the error that a model server has answered with; it may be tried again."""
        error = cls(status, "", retry_after=1.0)
        error.body = normalise(body, status)
        return error

    def of_model(self, name: str) -> "ApiError":
        """Return the same error with the name of the model that it comes from."""
        error = self.body["error"]
        message = f"{name}: {error['message']}"
        kind, code, param = error["type"], error["code"], error["param"]
        found = ApiError(self.status, message, kind, code, param, retry_after=1.0)
        found.code = self.code  # a server's own is for the client, not a metric's label
        return found

    def headers(self) -> list[tuple[bytes, bytes]]:
        """Return the headers that go with it."""
        if self.status == 401:
            return [(b"www-authenticate", b"Bearer")]
        if self.status == 405:
            return [(b"allow", b"POST")]  # of the proxied routes; FastAPI answers for the others
        if self.status not in (429, 503):
            return []
        return retry_headers(self.retry_after)


def retry_headers(seconds: float | None) -> list[tuple[bytes, bytes]]:
    """Return when to try again, in whole seconds and in milliseconds; None: it is no use."""
    if seconds is None:
        return [(b"x-should-retry", b"false")]
    return [
        (b"retry-after", b"%d" % max(1, math.ceil(seconds))),
        (b"retry-after-ms", b"%d" % max(1, math.ceil(seconds * 1000))),
    ]


def error_body(
    message: str, kind: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """Return the body of an error; `kind` is its `type`."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def error_type(status: int) -> str:
    """Return OpenAI's name for the errors of an HTTP status."""
    return "server_error" if status >= 500 else "invalid_request_error"


def wrong_type(name: str, expected: str, value: Any) -> ApiError:
    """Return OpenAI's 400 for a field whose value has another type."""
    message = f"Invalid type for '{name}': expected {expected}, but got {json_type(value)}."
    return ApiError(400, message, code="invalid_type", param=name)


def json_type(value: Any) -> str:
    """Return what OpenAI calls the type of a JSON value in its messages."""
    names = {bool: "a boolean", int: "an integer", float: "a decimal", str: "a string"}
    names |= {list: "an array", dict: "an object"}
    return names.get(type(value), "null")


def no_such_model(name: str) -> ApiError:
    """Return OpenAI's 404 for a model that is not served."""
    message = f"The model `{printable(name)}` does not exist or you do not have access to it."
    return ApiError(404, message, code="model_not_found")


def printable(text: str) -> str:
    """Return the beginning of a client's text, for logs and messages: it can be encoded."""
    return text[:128].encode(errors="replace").decode()


def normalise(body: bytes, status: int) -> dict[str, Any]:
    """Return an upstream's error body in OpenAI's shape.

    vLLM's own bodies have it but for `code`, where it puts the HTTP status: that becomes null, or
    for a model it does not serve "model_not_found", with OpenAI's null for `param`. Of the shapes
    that others (FastAPI, older vLLM, TGI) give their errors the message is taken; the beginning of
    anything else is the message itself.
    """
    try:
        parsed = json.loads(body) if len(body) <= MAX_ERROR else None
    except (ValueError, RecursionError):
        parsed = None
    error = unwrapped(parsed)
    if error is None:
        text = body[:MAX_MESSAGE].decode(errors="replace").strip()
        return error_body(text or status_phrase(status), error_type(status))
    code, param, kind = error.get("code"), error.get("param"), error.get("type")
    if not isinstance(code, str):
        code = None
        if (status, param) == (404, "model"):
            code, param = "model_not_found", None
    # vLLM says where in the request's parts a field is: "body.temperature".
    param = param.removeprefix("body.") if isinstance(param, str) else None
    kind = kind if isinstance(kind, str) else error_type(status)
    return error_body(error["message"], kind, code, param)


def unwrapped(parsed: Any) -> dict[str, Any] | None:
    """Return the object with the `message` of an error that some server has made; None: it has no
    shape that is known.

    {"error": {"message": ...}}, {"object": "error", "message": ...}, {"error": "..."}, and
    FastAPI's {"detail": "..."} and {"detail": [{"loc": ["body", "prompt"], "msg": ...}]}.
    """
    if not isinstance(parsed, dict):
        return None
    error = parsed.get("error", parsed.get("detail", parsed))
    if isinstance(error, list) and error and isinstance(error[0], dict):
        place, message = error[0].get("loc"), error[0].get("msg")
        param = ".".join(map(str, place)) if isinstance(place, list) else None
        error = {"message": message, "param": param}
    if isinstance(error, str):
        error = {"message": error}
    message = error.get("message") if isinstance(error, dict) else None
    return error if isinstance(message, str) and message else None


def status_phrase(status: int) -> str:
    """Return HTTP's own words for a status."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"HTTP {status}"
