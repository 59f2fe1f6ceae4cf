"""Answers to clients, sent as ASGI's messages."""

import json

from starlette.types import Send

from serving.call import Call
from serving.openai.errors import ApiError
from serving.upstream.http import Headers

JSON = (b"content-type", b"application/json")


async def whole(call: Call, status: int, headers: Headers, content: bytes, send: Send) -> None:
    """Send an answer in one piece."""
    call.status = status
    extra = [call.id_header, (b"content-length", b"%d" % len(content))]
    if call.account is not None:
        extra += call.account.headers()
    await send({"type": "http.response.start", "status": status, "headers": [*headers, *extra]})
    await send({"type": "http.response.body", "body": content, "more_body": False})


async def end_with_error(call: Call, error: ApiError, send: Send) -> None:
    """End a stream that has begun with an event that says why, and without [DONE]."""
    call.code = error.code
    last = b"data: %b\n\n" % json.dumps(error.body).encode()
    await send({"type": "http.response.body", "body": last, "more_body": False})
