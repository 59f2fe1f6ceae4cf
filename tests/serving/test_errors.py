"""What a request may get wrong, in OpenAI's words and shape, for any JSON at all."""

from collections.abc import Iterator
from typing import Any

import openai
import pytest

from tests.serving.helpers import Running, ask, error_of, metric, running
from tests.serving.standin import StandIn, standin, wait_for_value

ANY = {"prompt": "x", "input": "x", "messages": []}
"""The prompt of any route."""

LIMITS = {"max_prompt_chars": 100, "max_body_bytes": 2000}


@pytest.fixture(scope="module")
def upstream() -> Iterator[StandIn]:
    with standin() as server:
        yield server


@pytest.fixture(scope="module")
def gateway(upstream: StandIn) -> Iterator[Running]:
    with running(upstream.url, limits=LIMITS, timeouts={"body": 3}) as gateway:
        yield gateway


NOT_JSON = "We could not parse the JSON body of your request."


@pytest.mark.parametrize(
    ("body", "status", "param", "code", "message"),
    [
        (b"{not json", 400, None, None, NOT_JSON),
        (b"", 400, None, None, NOT_JSON),
        (b"\xff\xfe", 400, None, None, NOT_JSON),
        (b"[" * 1900, 400, None, None, NOT_JSON),
        (b"[]", 400, None, "invalid_type", "expected an object, but got an array"),
        (b"null", 400, None, "invalid_type", "but got null"),
        ({"prompt": "x"}, 400, None, None, "you must provide a model parameter"),
        ({"model": 7}, 400, "model", "invalid_type", "expected a string, but got an integer"),
        ({**ANY, "model": "q"}, 404, None, "model_not_found", "The model `q` does not exist"),
        (b"x" * 2001, 413, None, "body_too_large", "larger than 2000 bytes"),
    ],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"])
def test_bad_requests(
    gateway: Running,
    path: str,
    body: Any,
    status: int,
    param: str | None,
    code: str | None,
    message: str,
) -> None:
    answer = ask(gateway.url, "POST", path, body)
    error = error_of(answer)
    assert (answer.status, error["param"], error["code"]) == (status, param, code)
    assert error["type"] == "invalid_request_error"
    assert message in error["message"]
    assert len(answer.headers["x-request-id"]) == 32


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("/v1/completions", "prompt", "x" * 101),
        ("/v1/chat/completions", "messages", [{"role": "user", "content": "x" * 101}]),
        ("/v1/embeddings", "input", [[1] * 101]),
    ],
)
def test_longest_prompt_and_none(gateway: Running, path: str, field: str, value: Any) -> None:
    """By the route's own field; the others' are nothing to it."""
    answer = ask(gateway.url, "POST", path, {"model": "m", **ANY, field: value})
    error = error_of(answer)
    assert (answer.status, error["param"]) == (400, field)
    assert error["code"] == "string_above_max_length" and "maximum length 100," in error["message"]
    none = ask(gateway.url, "POST", path, {"model": "m", "max_tokens": 1})
    assert (none.status, error_of(none)["code"]) == (400, "missing_required_parameter")
    assert error_of(none)["param"] == field


def test_wrong_types(gateway: Running) -> None:
    for field, value, code, message in (
        (
            "max_tokens",
            "many",
            "invalid_value",
            "Invalid value for 'max_tokens': Input should be a",
        ),
        ("prompt", {"a": 1}, "invalid_type", "expected a string, or an array of strings, of token"),
    ):
        body = {"model": "m", "prompt": "x", field: value}
        answer = ask(gateway.url, "POST", "/v1/completions", body)
        error = error_of(answer)
        assert (answer.status, error["param"], error["code"]) == (400, field, code)
        assert message in error["message"]


def test_body_that_does_not_come(gateway: Running) -> None:
    answer = ask(gateway.url, "POST", "/v1/completions", None, content_length="5")
    assert (answer.status, error_of(answer)["type"]) == (408, "invalid_request_error")


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "unknown_url"),
        ("POST", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_supported"),
        ("GET", "/v1/completions/", 405, "method_not_supported"),
        ("POST", "/v1/models", 405, "method_not_supported"),
        ("GET", "/v1/models/q", 404, "model_not_found"),
    ],
)
def test_urls(gateway: Running, method: str, path: str, status: int, code: str) -> None:
    answer = ask(gateway.url, method, path)
    assert (answer.status, error_of(answer)["code"]) == (status, code)
    assert ("allow" in answer.headers) == (status == 405)


def test_exceptions_of_openais_client(gateway: Running) -> None:
    client = openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="nope", prompt="x")
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.BadRequestError) as long:
        client.completions.create(model="m", prompt="x" * 101)
    assert (long.value.code, long.value.param) == ("string_above_max_length", "prompt")


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"])
def test_unknown_fields_and_headers_go_on(gateway: Running, upstream: StandIn, path: str) -> None:
    body = {"model": "m", **ANY, "no_such_field": {"a": [1.50, None]}}
    headers = {"x_request_id": "my-id.7", "traceparent": "00-abc-def-01", "cookie": "c=1"}
    answer = ask(gateway.url, "POST", f"{path}?a=b", body, **headers)
    assert answer.status == 200 and answer.headers.get_all("x-request-id") == ["my-id.7"]
    seen = upstream.seen[-1]
    assert (seen["path"], seen["body"]) == (path, body)
    assert seen["headers"]["x-request-id"] == "my-id.7"
    assert seen["headers"]["traceparent"] == "00-abc-def-01"
    assert "cookie" not in seen["headers"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/embeddings"])
def test_slash_at_the_end(gateway: Running, upstream: StandIn, path: str) -> None:
    """The same route, in what the server gets and in what is counted."""

    def counted() -> float:
        return metric(gateway.url, "attnserve_requests_total", f'route="{path}"')

    before = counted()
    answer = ask(gateway.url, "POST", f"{path}/?a=b", {"model": "m", **ANY})
    assert answer.status == 200
    assert upstream.seen[-1]["path"] == path
    wait_for_value(counted, before + 1, "counted under its route")


def test_slash_at_the_end_of_the_gateways_own(gateway: Running) -> None:
    listed = ask(gateway.url, "GET", "/v1/models/")
    assert [entry["id"] for entry in listed.json()["data"]] == ["m"]
    assert error_of(ask(gateway.url, "POST", "/v1/compare/", {}))["param"] == "reference"


@pytest.mark.parametrize("data", [
    b"5", b'[{"id": "m", "x": NaN}]', b'[{"id": "m", "x": "\\ud800"}]', b'[{"id": "\\ud800"}]',
    b'[{"id": "m", "x": 1e999}]', b"[" * 100_000,
])  # fmt: skip
def test_a_list_of_models_that_is_none(gateway: Running, upstream: StandIn, data: bytes) -> None:
    """The gateway says then what it knows itself."""
    upstream.listed = b'{"data": %b}' % data
    try:
        listed = ask(gateway.url, "GET", "/v1/models")
    finally:
        upstream.listed = None
    assert listed.status == 200
    assert [entry["id"] for entry in listed.json()["data"]] == ["m"]


def test_headers_of_one_connection_end_there(gateway: Running, upstream: StandIn) -> None:
    """Those that Connection lists, too (RFC 9110, 7.6.1)."""
    named = {"connection": "X-One, keep-alive", "x_one": "1", "x_two": "2"}
    upstream.headers = [(b"connection", b"X-Three"), (b"x-three", b"3"), (b"x-four", b"4")]
    try:
        answer = ask(gateway.url, "POST", "/v1/completions", {"model": "m", **ANY}, **named)
    finally:
        upstream.headers = []
    seen = upstream.seen[-1]["headers"]
    assert "x-two" in seen and not {"x-one", "connection"} & seen.keys()
    assert answer.headers["x-four"] == "4" and "x-three" not in answer.headers


def test_usage_is_asked_for_and_hidden(gateway: Running, upstream: StandIn) -> None:
    body = {"model": "m", "prompt": "x", "max_tokens": 2, "stream": True}
    plain = ask(gateway.url, "POST", "/v1/completions", body)
    assert upstream.seen[-1]["body"]["stream_options"] == {"include_usage": True}
    assert b"usage" not in plain.body
    for options in ({"include_usage": False}, None, {"x": 1}):
        hidden = ask(gateway.url, "POST", "/v1/completions", {**body, "stream_options": options})
        assert hidden.body == plain.body
    asked = {**body, "stream_options": {"include_usage": True}}
    whole = ask(gateway.url, "POST", "/v1/completions", asked)
    assert upstream.seen[-1]["body"] == asked
    assert b'"completion_tokens": 2' in whole.body
    assert b"".join(e for e in whole.body.split(b"\n\n") if b"usage" in e)
    kept = [e for e in whole.body.split(b"\n\n") if b"usage" not in e]
    assert b"\n\n".join(kept) == plain.body
