"""The gateway in front of a real vLLM: answers, streams, errors, headers, metrics."""

import http.client
import json
from typing import Any
from urllib.parse import urlsplit

import openai
import pytest

from tests.servers import Server
from tests.serving.helpers import MODEL, ask, completion, error_of, leave


@pytest.fixture(scope="module")
def client(gateway: Server) -> openai.OpenAI:
    """OpenAI's own client."""
    return openai.OpenAI(base_url=f"{gateway.url}/v1", api_key="none", max_retries=0)


def test_answers_as_the_upstream_does(gateway: Server, upstream: Server) -> None:
    through = completion(gateway.url, max_tokens=16, logprobs=1)
    direct = completion(upstream.url, max_tokens=16, logprobs=1)
    assert through["choices"] == direct["choices"]
    assert through["usage"] == {k: v for k, v in direct["usage"].items() if v is not None}


def test_stream_has_the_same_tokens(client: openai.OpenAI, gateway: Server) -> None:
    whole = completion(gateway.url, max_tokens=16, ignore_eos=True)
    events = list(
        client.completions.create(
            model=MODEL,
            prompt="The license",
            temperature=0,
            max_tokens=16,
            stream=True,
            extra_body={"ignore_eos": True},
        )
    )
    assert "".join(e.choices[0].text for e in events) == whole["choices"][0]["text"]
    assert 1 < len(events) <= 16  # vLLM puts tokens into one event when it is ahead of its reader


def test_stream_is_passed_on_piece_by_piece(gateway: Server) -> None:
    connection = http.client.HTTPConnection(urlsplit(gateway.url).netloc, timeout=60)
    body = {"model": MODEL, "prompt": "x", "max_tokens": 30_000, "ignore_eos": True, "stream": True}
    headers = {"content-type": "application/json"}
    connection.request("POST", "/v1/completions", json.dumps(body), headers)
    response = connection.getresponse()
    assert response.headers["content-type"].startswith("text/event-stream")
    assert response.headers["x-accel-buffering"] == "no"
    assert response.headers["cache-control"] == "no-cache"
    assert response.readline().startswith(b"data: ")
    # The upstream is still busy with this request when its first event has arrived here.
    metrics = ask(gateway.url, "GET", "/metrics").body.decode()
    assert "attnserve_requests_in_flight 2.0" in metrics  # the stream and this one
    leave(connection)
    response.close()


def test_stream_ends_as_openais(gateway: Server) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 4, "stream": True}
    answer = ask(gateway.url, "POST", "/v1/completions", body)
    assert answer.body.endswith(b"\n\ndata: [DONE]\n\n")


def test_usage_in_streams(client: openai.OpenAI) -> None:
    events = list(
        client.completions.create(
            model=MODEL,
            prompt="x",
            max_tokens=4,
            stream=True,
            stream_options={"include_usage": True},
        )
    )
    assert events[-1].usage is not None and events[-1].usage.prompt_tokens == 1


def test_models(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]


def test_health(gateway: Server) -> None:
    answer = ask(gateway.url, "GET", "/health")
    assert answer.status == 200
    assert (answer.json()["status"], answer.json()["upstream_ready"]) == ("ok", True)


def test_unknown_fields_pass(gateway: Server) -> None:
    assert completion(gateway.url, max_tokens=1, no_such_field=1)["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("body", "status", "param", "code"),
    [
        ({"model": "nope", "prompt": "x"}, 404, None, "model_not_found"),
        ({"model": MODEL, "prompt": "x", "max_tokens": -1}, 400, "max_tokens", None),
        ({"model": MODEL, "prompt": "x", "temperature": "hot"}, 400, "temperature", None),
        ({"model": MODEL, "prompt": [5, 10**6]}, 400, None, None),
        # vLLM itself begins a stream, with the status 200, and says 400 in its only event.
        ({"model": MODEL, "prompt": [5, 10**6], "stream": True}, 400, None, None),
        (b"{not json", 400, None, None),
        (b"", 400, None, None),
    ],
    ids=["model", "max_tokens", "temperature", "no token", "no token, stream", "not json", "empty"],
)
def test_upstream_errors_get_openais_shape(
    gateway: Server, body: Any, status: int, param: str | None, code: str | None
) -> None:
    answer = ask(gateway.url, "POST", "/v1/completions", body)
    error = error_of(answer)
    assert (answer.status, error["code"]) == (status, code)
    assert error["param"] == param


def test_embeddings_of_a_model_that_cannot(gateway: Server, upstream: Server) -> None:
    """vLLM does not have the route then, and FastAPI says so in a shape of its own."""
    body = {"model": MODEL, "input": "x"}
    said = ask(upstream.url, "POST", "/v1/embeddings", body)
    answer = ask(gateway.url, "POST", "/v1/embeddings", body)
    assert answer.status == said.status == 404
    assert error_of(answer)["message"] == said.json()["detail"]
    assert error_of(answer)["code"] is None  # it is not the model that is unknown


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", "/nothing", 404, "unknown_url"),
        ("POST", "/v1/nothing", 404, "unknown_url"),
        ("GET", "/v1/completions", 405, "method_not_supported"),
    ],
)
def test_own_errors_have_openais_shape(
    gateway: Server, method: str, path: str, status: int, code: str
) -> None:
    answer = ask(gateway.url, method, path)
    assert (answer.status, error_of(answer)["code"]) == (status, code)


def test_openais_client_sees_its_own_exceptions(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.completions.create(model="nope", prompt="x")
    assert caught.value.code == "model_not_found"


def test_request_id_goes_both_ways(gateway: Server) -> None:
    body = {"model": MODEL, "prompt": "x", "max_tokens": 1}
    answer = ask(gateway.url, "POST", "/v1/completions", body, x_request_id="my-id.7")
    assert answer.headers.get_all("x-request-id") == ["my-id.7"]
    assert "my-id.7" in answer.json()["id"]  # vLLM took it over


@pytest.mark.parametrize("given", ["", "two words", "x" * 129])
def test_unusable_request_ids_are_replaced(gateway: Server, given: str) -> None:
    answer = ask(gateway.url, "GET", "/v1/models", x_request_id=given)
    assert len(answer.headers["x-request-id"]) == 32


def test_connection_serves_many_requests(gateway: Server) -> None:
    connection = http.client.HTTPConnection(urlsplit(gateway.url).netloc, timeout=60)
    body = json.dumps({"model": MODEL, "prompt": "x", "max_tokens": 1})
    for _ in range(3):
        connection.request("POST", "/v1/completions", body, {"content-type": "application/json"})
        response = connection.getresponse()
        assert response.status == 200
        response.read()
        assert connection.sock is not None  # not closed by the gateway
    connection.close()


def test_metrics_name_route_and_status(gateway: Server) -> None:
    completion(gateway.url, max_tokens=1)
    ask(gateway.url, "POST", "/v1/completions", {"model": "nope", "prompt": "x"})
    ask(gateway.url, "GET", "/metrics")
    text = ask(gateway.url, "GET", "/metrics").body.decode()
    for model, route, status in [
        (MODEL, "/v1/completions", 200),
        ("*", "/v1/completions", 404),  # names that nobody serves get no metrics of their own
        ("", "/metrics", 200),
    ]:
        labels = f'bits="",model="{model}",route="{route}",status="{status}",variant=""'
        assert f"attnserve_requests_total{{{labels}}}" in text
    assert (
        f'attnserve_time_to_first_token_seconds_bucket{{bits="",le="0.005",model="{MODEL}"' in text
    )
    assert "attnserve_requests_in_flight 1.0" in text  # this one
