"""Who is let in: hosts, content types, web pages' origins, headers that may stand once, and when a
gateway may be open to everybody."""

import asyncio
import http.client
import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
import yaml
from fastapi import Request
from fastapi.exceptions import RequestValidationError

from serving.access import host_name
from serving.auth import digest, new_key
from tests.serving.helpers import HttpAnswer, Running, ask, configured, error_of, running
from tests.serving.standin import standin, wait_for

BODY = {"model": "m", "prompt": "x", "max_tokens": 2}
ALICE, BOB = new_key(), new_key()
KEYS = [{"name": n, "sha256": digest(k)} for n, k in (("alice", ALICE), ("bob", BOB))]
PAGE = "https://chat.example.com"

POST = [("POST", p) for p in ("/v1/completions", "/v1/chat/completions", "/v1/embeddings")]
GET = [("GET", p) for p in ("/v1/models", "/v1/models/m", "/health", "/metrics", "/", "/none")]
ROUTES = [*POST, ("POST", "/v1/compare"), *GET, ("OPTIONS", "/v1/completions"), ("PUT", "/v1/x")]


@pytest.fixture(scope="module")
def shared() -> Iterator[Running]:
    """Yield a gateway with keys, another name, and one page's origin."""
    config = {"keys": KEYS, "allowed_hosts": ["gw.example.com", "*.corp"], "cors_origins": [PAGE]}
    with standin() as upstream, running(upstream.url, **config) as gateway:
        yield gateway


def send(
    url: str, method: str, path: str, headers: list[tuple[str, str]], host: str | None = "localhost"
) -> HttpAnswer:
    """Send exactly these headers, in this order."""
    connection = http.client.HTTPConnection(urlsplit(url).netloc, timeout=60)
    connection.putrequest(method, path, skip_host=True, skip_accept_encoding=True)
    data = json.dumps(BODY).encode() if method == "POST" else b""
    if host is not None:
        connection.putheader("host", host)
    for name, value in headers:
        connection.putheader(name, value)
    if data:
        connection.putheader("content-length", str(len(data)))
    connection.endheaders(data)
    answer = HttpAnswer(connection.getresponse())
    connection.close()
    return answer


def bearer(key: str) -> tuple[str, str]:
    return "authorization", f"Bearer {key}"


JSON = ("content-type", "application/json")


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    "twice",
    [
        [bearer(ALICE), bearer(BOB)],
        [bearer(ALICE), bearer("wrong")],
        [bearer("wrong"), bearer(ALICE)],
        [bearer(ALICE), ("Authorization", f"Bearer {ALICE}")],
        [bearer(ALICE), ("host", "localhost")],
        [bearer(ALICE), JSON],
    ],
)
def test_header_twice(
    shared: Running, method: str, path: str, twice: list[tuple[str, str]]
) -> None:
    answer = send(shared.url, method, path, [JSON, *twice])
    assert (answer.status, error_of(answer)["code"]) == (400, "duplicate_header")


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize(
    ("host", "good"),
    [
        ("localhost", True),
        ("LOCALHOST:8080", True),
        ("127.0.0.1:1", True),
        ("[::1]:8080", True),
        ("a.localhost", True),
        ("gw.example.com", True),
        ("GW.example.com:443", True),
        ("a.b.corp", True),
        (None, True),  # HTTP/1.0, which no browser speaks
        ("evil.example", False),
        ("corp", False),
        ("xcorp", False),
        ("localhost.evil.example", False),
        ("127.0.0.1.evil.example", False),
        ("10.0.0.1", False),
        ("", False),
    ],
)
def test_host(shared: Running, method: str, path: str, host: str | None, good: bool) -> None:
    answer = send(shared.url, method, path, [JSON, bearer(ALICE)], host)
    refused = answer.status == 400 and error_of(answer)["code"] == "invalid_host"
    assert refused != good


def test_host_of_a_gateway_for_others() -> None:
    with standin() as upstream:
        with running(upstream.url, host="0.0.0.0") as gateway:
            assert send(gateway.url, "POST", "/v1/completions", [JSON], "any.name").status == 200
        hosts = {"host": "0.0.0.0", "allowed_hosts": ["gw"]}
        with running(upstream.url, **hosts) as gateway:
            names = ("gw", "10.0.0.1:80", "[fe80::1]", "localhost", "10.0.0.1.evil")
            statuses = [send(gateway.url, *POST[0], [JSON], name).status for name in names]
            assert statuses == [200, 200, 200, 400, 400]


@pytest.mark.parametrize(
    ("header", "name"),
    [("A.b:80", "a.b"), ("[::1]", "[::1]"), ("[::1]:80", "[::1]"), ("a:", "a"), (":80", "")],
)
def test_host_name(header: str, name: str) -> None:
    assert host_name(header.encode()) == name


CONTENT_TYPES = [
    "application/json",
    "Application/JSON; charset=utf-8",
    "application/json;",
    "application/json ;x=y",
    " application/json",
    "text/plain",
    "application/x-www-form-urlencoded",
    "multipart/form-data; boundary=x",
    "application/jsonp",
    "application/vnd.api+json",
    "text/plain, application/json",
    "",
]


@pytest.mark.parametrize("given", CONTENT_TYPES)
@pytest.mark.parametrize("path", [p for _, p in POST])
def test_content_type_is_judged_as_vllm_does(shared: Running, given: str, path: str) -> None:
    from vllm.entrypoints.serve.utils.api_utils import validate_json_request

    scope = {"type": "http", "headers": [(b"content-type", given.strip().encode())]}
    try:
        asyncio.run(validate_json_request(Request(scope)))
        good = True
    except RequestValidationError:
        good = False
    answer = send(shared.url, "POST", path, [bearer(ALICE), ("content-type", given)])
    assert (answer.status != 415) == good
    if not good:
        assert error_of(answer)["code"] == "unsupported_media_type"


def test_no_content_type(shared: Running) -> None:
    assert send(shared.url, "POST", "/v1/compare", [bearer(ALICE)]).status == 415


@pytest.mark.parametrize(("method", "path"), ROUTES)
@pytest.mark.parametrize("stream", [False, True])
def test_pages_of_an_allowed_origin(shared: Running, method: str, path: str, stream: bool) -> None:
    """Before the request and with its answer, whatever that is, streams and errors too."""
    asks = [("origin", PAGE), ("access-control-request-method", "POST")]
    asks.append(("access-control-request-headers", "authorization,content-type"))
    before = send(shared.url, "OPTIONS", path, asks)
    assert before.status == 200
    assert before.headers.get_all("access-control-allow-origin") == [PAGE]
    assert "POST" in before.headers["access-control-allow-methods"]
    assert "authorization" in before.headers["access-control-allow-headers"]

    body = {**BODY, "stream": stream} if method == "POST" else None
    for headers in ({}, {"authorization": f"Bearer {ALICE}"}):
        answer = ask(shared.url, method, path, body, origin=PAGE, **headers)
        assert answer.headers.get_all("access-control-allow-origin") == [PAGE]
        assert "x-ratelimit-reset-tokens" in answer.headers["access-control-expose-headers"]
        assert "Origin" in answer.headers["vary"]


@pytest.mark.parametrize("origin", ["https://evil.example", "null", PAGE + ":1", PAGE + ".evil"])
def test_pages_of_other_origins(shared: Running, origin: str) -> None:
    asks = [("origin", origin), ("access-control-request-method", "POST")]
    before = send(shared.url, "OPTIONS", "/v1/completions", asks)
    assert before.status == 400 and "access-control-allow-origin" not in before.headers
    answer = ask(shared.url, "GET", "/health", origin=origin)
    assert "access-control-allow-origin" not in answer.headers
    assert answer.headers["vary"] == "Origin"


def test_cors_is_off_by_default() -> None:
    """Even where the model server would allow every page, as vLLM does."""
    with standin() as upstream:
        upstream.headers = [(b"access-control-allow-origin", b"*")]
        with running(upstream.url) as gateway:
            asks = [("origin", PAGE), ("access-control-request-method", "POST")]
            assert send(gateway.url, "OPTIONS", "/v1/completions", asks).status == 405
            for stream in (False, True):
                body = {**BODY, "stream": stream}
                answer = ask(gateway.url, "POST", "/v1/completions", body, origin=PAGE)
                assert answer.status == 200
                assert not [name for name in answer.headers if name.startswith("access-control")]
            assert "origin" not in upstream.seen[-1]["headers"]


def test_metrics_of_a_gateway_for_others_need_a_key() -> None:
    """They have the names of keys and the addresses of servers."""
    with standin() as upstream:
        for host, protect, status in (
            ("127.0.0.1", None, 200),
            ("0.0.0.0", None, 401),
            ("0.0.0.0", False, 200),
            ("127.0.0.1", True, 401),
        ):
            with running(upstream.url, keys=KEYS, host=host, protect_metrics=protect) as gateway:
                assert ask(gateway.url, "GET", "/metrics").status == status
                health = ask(gateway.url, "GET", "/health").body.decode()
                assert upstream.url not in health and "alice" not in health
                page = ask(gateway.url, "GET", "/metrics", authorization=f"Bearer {ALICE}")
                assert page.status == 200 and upstream.url in page.body.decode()


def test_last_key_does_not_open_the_gateway(tmp_path: Path) -> None:
    """Neither without `keys` nor with none in it, nor in a file that is written in two steps."""
    with standin() as upstream:
        models = [{"name": "m", "replicas": [upstream.url]}]
        with configured(tmp_path, {"models": models, "keys": KEYS}) as gateway:
            file = tmp_path / "gateway.yaml"
            head = yaml.safe_dump({**yaml.safe_load(file.read_text()), "keys": []})
            texts = (
                head.replace("keys: []\n", ""),
                head,
                head.replace("keys: []", "keys:"),
                head + "protect_metrics: false\n",
            )
            for refused, text in enumerate(texts, 1):
                file.write_text(text)
                wait_for(
                    lambda: gateway.log().count("configuration refused") == refused,  # noqa: B023
                    "the file is refused",
                )
                assert ask(gateway.url, "POST", "/v1/completions", BODY).status == 401
                key = {"authorization": f"Bearer {ALICE}"}
                assert ask(gateway.url, "POST", "/v1/completions", BODY, **key).status == 200
            file.write_text(head + "open: true\n")
            wait_for(lambda: "configuration reloaded" in gateway.log(), "it is meant")
            assert ask(gateway.url, "POST", "/v1/completions", BODY).status == 200
            assert digest(ALICE) not in gateway.log()


def test_servers_keys_are_lent_only_on_purpose(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("OWN_KEY", "the-servers-own")
    caplog.set_level(logging.DEBUG)
    with standin() as upstream:
        models: Any = [{"name": "m", "replicas": [upstream.url], "api_key_env": "OWN_KEY"}]
        with pytest.raises(ValueError, match="api_key_env needs keys"):
            Running(models=models)
        with running(models=models, open=True) as gateway:
            assert ask(gateway.url, "POST", "/v1/completions", BODY).status == 200
    assert upstream.seen[0]["headers"]["authorization"] == "Bearer the-servers-own"
    assert "the-servers-own" not in caplog.text
