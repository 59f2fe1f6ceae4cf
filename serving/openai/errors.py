"""Errors in the shape OpenAI's clients expect: {"error": {"message", "type", "param", "code"}}."""

import json
import math
from http import HTTPStatus
from typing import Any


class ApiError(Exception):
    """An answer that is an error of the gateway's own.

    A 429 or 503 says when to try again: after `retry_after` seconds, or, if that is None, never.
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
        self.body = error_body(message, kind or kind_of(status), code, param)
        self.retry_after = retry_after

    def headers(self) -> list[tuple[bytes, bytes]]:
        """The headers that go with it."""
        if self.status == 401:
            return [(b"www-authenticate", b"Bearer")]
        if self.status == 405:
            return [(b"allow", b"POST")]  # of the proxied routes; FastAPI answers for the others
        if self.status not in (429, 503):
            return []
        return retry_headers(self.retry_after)


def retry_headers(seconds: float | None) -> list[tuple[bytes, bytes]]:
    """When to try again, in whole seconds and in milliseconds; None: it is no use."""
    if seconds is None:
        return [(b"x-should-retry", b"false")]
    return [
        (b"retry-after", b"%d" % max(1, math.ceil(seconds))),
        (b"retry-after-ms", b"%d" % max(1, math.ceil(seconds * 1000))),
    ]


def error_body(
    message: str, kind: str, code: str | None = None, param: str | None = None
) -> dict[str, Any]:
    """The body of an error; `kind` is its `type`."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def kind_of(status: int) -> str:
    """OpenAI's name for the errors of an HTTP status."""
    return "server_error" if status >= 500 else "invalid_request_error"


def no_key() -> ApiError:
    """A request without any key."""
    message = (
        "You didn't provide an API key. You need to provide your API key in an Authorization "
        "header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY)."
    )
    return ApiError(401, message)


def wrong_key() -> ApiError:
    """A key that is none of ours; the message does not repeat it."""
    return ApiError(401, "Incorrect API key provided.", code="invalid_api_key")


def no_such_model(name: str) -> ApiError:
    """A model that is not served."""
    message = f"The model `{name}` does not exist or you do not have access to it."
    return ApiError(404, message, code="model_not_found")


def normalise(body: bytes, status: int) -> bytes:
    """An upstream's error body in OpenAI's shape.

    vLLM's own bodies have it but for `code`, where it puts the HTTP status: that becomes null, or
    for a model it does not serve "model_not_found", with OpenAI's null for `param`. Anything else
    is wrapped.
    """
    try:
        parsed = json.loads(body)
    except (ValueError, RecursionError):
        parsed = None
    error = parsed.get("error") if isinstance(parsed, dict) else None
    if isinstance(error, dict) and isinstance(error.get("message"), str):
        code, param = error.get("code"), error.get("param")
        if not isinstance(code, str):
            code = None
            if (status, param) == (404, "model"):
                code, param = "model_not_found", None
        kind = error.get("type")
        # vLLM says where in the request's parts a field is: "body.temperature".
        param = param.removeprefix("body.") if isinstance(param, str) else None
        kind = kind if isinstance(kind, str) else kind_of(status)
        whole = error_body(error["message"], kind, code, param)
    else:
        text = body.decode(errors="replace").strip()
        whole = error_body(text or phrase(status), kind_of(status))
    return json.dumps(whole).encode()


def phrase(status: int) -> str:
    """HTTP's own words for a status."""
    try:
        return HTTPStatus(status).phrase
    except ValueError:
        return f"HTTP {status}"
