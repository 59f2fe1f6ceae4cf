"""Keys and what they may use: hashes only, limits per key, rotation, nothing secret in logs."""

import asyncio
import http.client
import json
import logging
import math
from typing import Any

import pytest

from serving.auth import digest, new_key
from serving.config import KeyEntry
from serving.rate_limit import Account, Bucket, duration
from tests.serving.helpers import (
    HttpAnswer,
    Running,
    ask,
    error_of,
    leave,
    metric,
    open_request,
    request_lines,
    running,
)
from tests.serving.scripted import OK, beside_server, says
from tests.serving.standin import standin, wait_for, wait_for_value

BODY = {"model": "m", "prompt": "x" * 40, "max_tokens": 10}  # 10 + 10 tokens by the guess
ALICE, BOB = new_key(), new_key()


def entry(key: str, name: str, **limits: float) -> dict[str, Any]:
    return {"name": name, "sha256": digest(key), **limits}


def complete(gateway: Running, key: str = ALICE, **fields: Any) -> HttpAnswer:
    bearer = f"Bearer {key}"
    body = {**BODY, **fields}
    return ask(gateway.url, "POST", "/v1/completions", body, authorization=bearer)


@pytest.mark.parametrize("model", ["m", "*"])
def test_padded_prompts_are_as_long_as_the_context(model: str) -> None:
    """vLLM's `padding`, for embeddings: known before the server works on it."""
    body = {"model": "m", "input": ["a", "b", "c"]}
    with standin() as upstream:  # which says that its context is 99 tokens
        models = [{"name": model, "replicas": [upstream.url]}]
        with running(models=models, keys=[entry(ALICE, "a", tokens_per_minute=296)]) as gateway:

            def embed(**fields: Any) -> HttpAnswer:
                bearer = f"Bearer {ALICE}"
                path = "/v1/embeddings"
                return ask(gateway.url, "POST", path, {**body, **fields}, authorization=bearer)

            refused = embed(padding="max_length")
            assert refused.status == 429 and "Requested 297." in error_of(refused)["message"]
            assert embed(padding="max_length", input="a").status == 200
            assert embed(padding="do_not_pad").status == embed(padding=None).status == 200
            assert error_of(embed(padding="x"))["param"] == "padding"


def test_keys_are_random_and_long() -> None:
    keys = {new_key() for _ in range(100)}
    assert len(keys) == 100
    assert min(map(len, keys)) >= 43 + len("attnserve-")


@pytest.mark.parametrize(
    ("header", "code"),
    [
        ("", None),
        ("Bearer", "invalid_api_key"),
        ("Bearer ", "invalid_api_key"),
        (f"Bearer {ALICE}x", "invalid_api_key"),
        (f"Bearer {ALICE[:-1]}", "invalid_api_key"),
        (f"Basic {ALICE}", "invalid_api_key"),
        (ALICE, "invalid_api_key"),
        (f"Bearer {digest(ALICE)}", "invalid_api_key"),
    ],
    ids=["none", "no_key", "empty", "longer", "shorter", "basic", "bare", "hash"],
)
@pytest.mark.parametrize("path", ["/v1/completions", "/v1/models", "/v1/models/m"])
def test_wrong_keys(shared: Running, header: str, code: str | None, path: str) -> None:
    method = "POST" if path == "/v1/completions" else "GET"
    headers = {"authorization": header} if header else {}
    answer = ask(shared.url, method, path, BODY, **headers)
    error = error_of(answer)
    assert (answer.status, error["code"], error["type"]) == (401, code, "invalid_request_error")
    assert ALICE[:-1] not in error["message"]


@pytest.fixture(scope="module")
def shared() -> Any:
    """Return a gateway with one key, for tests that change nothing."""
    with standin() as upstream, running(upstream.url, keys=[entry(ALICE, "alice")]) as gateway:
        yield gateway


def test_right_key(shared: Running) -> None:
    assert complete(shared).status == 200
    bearer = {"authorization": f"bearer  {ALICE}"}
    assert ask(shared.url, "GET", "/v1/models", **bearer).status == 200
    for path in ("/health", "/metrics"):
        assert ask(shared.url, "GET", path).status == 200


def test_protected_metrics() -> None:
    with standin() as upstream:
        keys = [entry(ALICE, "alice")]
        with running(upstream.url, keys=keys, protect_metrics=True) as gateway:
            assert ask(gateway.url, "GET", "/metrics").status == 401
            bearer = {"authorization": f"Bearer {ALICE}"}
            assert ask(gateway.url, "GET", "/metrics", **bearer).status == 200


def test_keys_stay_here_and_the_servers_own_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OWN_KEY", "the-servers-own")
    with standin() as upstream:
        models = [{"name": "m", "replicas": [upstream.url], "api_key_env": "OWN_KEY"}]
        with running(models=models, keys=[entry(ALICE, "alice")]) as gateway:
            assert complete(gateway).status == 200
    assert upstream.seen[0]["headers"]["authorization"] == "Bearer the-servers-own"


def test_rotation() -> None:
    with standin() as upstream, running(upstream.url, keys=[entry(ALICE, "a")]) as gateway:
        models = [{"name": "m", "replicas": [upstream.url]}]
        assert [complete(gateway, k).status for k in (ALICE, BOB)] == [200, 401]
        gateway.apply(models=models, keys=[entry(ALICE, "a"), entry(BOB, "b")])
        assert [complete(gateway, k).status for k in (ALICE, BOB)] == [200, 200]
        gateway.apply(models=models, keys=[entry(BOB, "b")])
        assert [complete(gateway, k).status for k in (ALICE, BOB)] == [401, 200]


def held(gateway: Running, key: str, body: dict[str, Any]) -> http.client.HTTPResponse:
    """Send a request, and return its answer when its head is here."""
    connection = open_request(gateway.url, {**BODY, **body}, authorization=f"Bearer {key}")
    return connection.getresponse()


def test_revoked_key_ends_what_runs() -> None:
    """Streams with an error event, what waits with 401; other keys' streams go on."""
    keys = [entry(ALICE, "alice"), entry(BOB, "bob")]
    with standin("m") as upstream, standin("whole") as whole:
        models = [
            {"name": "m", "replicas": [upstream.url]},
            {"name": "whole", "replicas": [whole.url]},
        ]
        limits = {"max_concurrent_per_replica": 2}
        with running(models=models, keys=keys, limits=limits) as gateway:
            upstream.between_s = 0.2
            stream = {"stream": True, "max_tokens": 1000}
            bobs, alices = (held(gateway, key, stream) for key in (BOB, ALICE))
            assert alices.readline() and bobs.readline()
            whole.before_s = 60.0
            waiting = [
                open_request(gateway.url, {**BODY, **body}, authorization=f"Bearer {ALICE}")
                for body in ({"stream": True}, {"model": "whole"})  # for room, for the answer
            ]
            wait_for(lambda: gateway.metric("attnserve_queue_length") == 1, "one waits for room")
            wait_for(lambda: whole.running == 1, "one runs")

            gateway.apply(models=models, keys=keys, limits=limits)  # changes nothing
            assert alices.readline() is not None
            gateway.apply(models=models, keys=keys[1:], limits=limits)
            *_, last = alices.read().strip().split(b"\n\n")
            assert json.loads(last.removeprefix(b"data: "))["error"]["code"] == "key_revoked"
            for connection in waiting:
                answer = HttpAnswer(connection.getresponse())
                assert (answer.status, error_of(answer)["code"]) == (401, "key_revoked")
            wait_for(lambda: upstream.aborted == whole.aborted == 1, "the servers are freed")
            assert upstream.running == 1 and bobs.readline() is not None
            codes = 'code="key_revoked"'
            assert metric(gateway.url, "attnserve_errors_total{", codes) == 3
            assert gateway.metric("attnserve_aborts_total{") == 0
            assert complete(gateway).status == 401
            gateway.apply(models=models, keys=keys[:1], limits=limits)
            assert b"key_revoked" in bobs.read()


def test_requests_per_minute() -> None:
    keys = [entry(ALICE, "alice", requests_per_minute=2), entry(BOB, "bob")]
    with standin() as upstream, running(upstream.url, keys=keys) as gateway:
        first = complete(gateway)
        assert first.headers["x-ratelimit-limit-requests"] == "2"
        assert first.headers["x-ratelimit-remaining-requests"] == "1"
        complete(gateway)
        third = complete(gateway)
        error = error_of(third)
        assert (third.status, error["type"]) == (429, "requests")
        assert error["code"] == "rate_limit_exceeded"
        assert 0 < int(third.headers["retry-after"]) <= 30
        assert 0 < int(third.headers["retry-after-ms"]) <= 30_000
        assert complete(gateway, BOB).status == 200  # each has its own
        assert upstream.started == 3
        gateway.apply(models=[{"name": "m", "replicas": [upstream.url]}], keys=keys)
        assert complete(gateway).status == 429  # a reload forgets nothing


@pytest.mark.parametrize("stream", [False, True])
def test_tokens_are_reserved_and_settled(stream: bool) -> None:
    """20 are reserved by the guess; the answer's usage says 7 + max_tokens."""
    keys = [entry(ALICE, "alice", tokens_per_minute=100)]
    with standin() as upstream, running(upstream.url, keys=keys) as gateway:
        upstream.before_s = 60.0
        running_one = open_request(
            gateway.url, {**BODY, "max_tokens": 85}, authorization=f"Bearer {ALICE}"
        )
        wait_for(lambda: upstream.running == 1, "it runs")
        answer = complete(gateway, stream=stream)  # 95 are reserved
        assert (answer.status, error_of(answer)["type"]) == (429, "tokens")
        leave(running_one)
        wait_for(lambda: gateway.metric("attnserve_aborts_total{") == 1, "it has left")
        upstream.before_s = 0.0
        answer = complete(gateway, stream=stream)  # only the prompt of the other is charged
        assert answer.status == 200
        tokens = 'attnserve_key_tokens_total{key="alice"}'
        wait_for(lambda: gateway.metric(tokens) == 10 + 17, "settled by usage")


def test_tokens_per_day() -> None:
    """A budget: the day's tokens go with every request, and come back by a few in an hour."""
    keys = [entry(ALICE, "alice", tokens_per_minute=1000, tokens_per_day=60)]
    with standin() as upstream, running(upstream.url, keys=keys) as gateway:
        statuses = [complete(gateway).status for _ in range(4)]  # 20 are reserved, 17 used
        answer = complete(gateway)
        assert statuses == [200, 200, 200, 429] and upstream.started == 3
        assert (
            "tokens per day (TPD): Limit 60, Used 51, Requested 20" in error_of(answer)["message"]
        )
        assert 15_000 < int(answer.headers["retry-after"]) <= 11 * 86400 // 60


PRICES = {"prompt_price": 1000, "completion_price": 10_000}  # of a million tokens


@pytest.mark.parametrize("stream", [False, True])
def test_cost_per_day(stream: bool) -> None:
    """Of 0.3, each request reserves 10 prompt tokens and 10 more, 0.11, and uses 7 and 10, 0.107;
    prompt tokens cost a tenth of the others."""
    keys = [entry(ALICE, "alice", cost_per_day=0.3)]
    with standin() as upstream:
        models = [{"name": "m", "replicas": [upstream.url], **PRICES}]
        with running(models=models, keys=keys) as gateway:
            assert complete(gateway, max_tokens=30).status == 429
            statuses = [complete(gateway, stream=stream).status for _ in range(3)]
            assert statuses == [200, 200, 429]
            answer = complete(gateway)
            error = error_of(answer)
            assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
            assert "cost per day: Limit 0.3, Used 0.21" in error["message"]
            assert "Requested 0.110000" in error["message"]
            assert 0 < int(answer.headers["retry-after"]) < 86400
            prompt = "x" * 256  # its 64 tokens cost more than is left, but not those of its answer
            assert complete(gateway, max_tokens=1).status == 200
            assert complete(gateway, prompt=prompt, max_tokens=1).status == 429


def test_headers_are_openais() -> None:
    """https://platform.openai.com/docs/guides/rate-limits, "Rate limits in headers"."""
    limits = {"requests_per_minute": 60, "tokens_per_minute": 150_000, "tokens_per_day": 10**6}
    keys = [entry(ALICE, "alice", **limits), entry(BOB, "bob", tokens_per_day=2400)]
    with standin() as upstream, running(upstream.url, keys=keys) as gateway:
        for answer in (complete(gateway, stream=True), complete(gateway), complete(gateway, n=0)):
            found = {n: v for n, v in answer.headers.items() if n.startswith("x-ratelimit")}
            assert set(found) == {
                f"x-ratelimit-{name}-{what}"
                for name in ("limit", "remaining", "reset")
                for what in ("requests", "tokens")
            }
            assert found["x-ratelimit-limit-requests"] == "60"
            assert 57 <= int(found["x-ratelimit-remaining-requests"]) <= 59
            assert found["x-ratelimit-limit-tokens"] == "150000"
            assert 149_900 < int(found["x-ratelimit-remaining-tokens"]) < 150_000
            assert found["x-ratelimit-reset-requests"].endswith("s")
            assert found["x-ratelimit-reset-tokens"].endswith("ms")
        answer = complete(gateway, BOB)
        assert answer.headers["x-ratelimit-limit-tokens"] == "2400"
        assert answer.headers["x-ratelimit-remaining-tokens"] == "2380"
        assert answer.headers["x-ratelimit-reset-tokens"].startswith("1")  # 20 of 2400: 12 min
        assert "m" in answer.headers["x-ratelimit-reset-tokens"]
        assert "x-ratelimit-limit-requests" not in answer.headers


@pytest.mark.parametrize(
    ("seconds", "text"),
    [
        (0.0, "0s"),
        (0.0001, "1ms"),
        (0.017, "17ms"),
        (0.9999, "1s"),
        (1.0, "1s"),
        (8.64, "8.64s"),
        (59.9999, "1m0s"),
        (72.5, "1m12.5s"),
        (360.0, "6m0s"),
        (3600.0, "1h0m0s"),
        (86_400.0, "24h0m0s"),
    ],
)
def test_durations_are_gos(seconds: float, text: str) -> None:
    assert duration(seconds) == text


@pytest.mark.parametrize("limit", ["tokens_per_minute", "tokens_per_day"])
def test_request_above_the_whole_limit(limit: str) -> None:
    keys = [entry(ALICE, "alice", **{limit: 100})]
    with standin() as upstream, running(upstream.url, keys=keys) as gateway:
        answer = complete(gateway, max_tokens=101)
        assert (answer.status, error_of(answer)["type"]) == (429, "tokens")
        assert answer.headers["x-should-retry"] == "false"
        assert "retry-after" not in answer.headers


def test_absurd_numbers_are_no_error_of_the_gateway() -> None:
    with standin() as upstream, running(upstream.url, keys=[entry(ALICE, "a")]) as gateway:
        upstream.status = 400
        assert complete(gateway, max_tokens=10**400).status == 400
        account = gateway.state.keys.account(f"Bearer {ALICE}".encode())
        assert account is not None and account.in_flight == 0


def test_failed_requests_cost_no_tokens() -> None:
    keys = [entry(ALICE, "alice", tokens_per_minute=100)]
    with standin() as upstream, running(upstream.url, keys=keys) as gateway:
        upstream.status = 400
        for _ in range(8):
            assert complete(gateway).status == 400


@pytest.mark.parametrize(
    ("header", "used"),
    [
        (b"", 20),
        (b"metadata: {}\r\n", 20),
        (b'metadata: {"data": [], "usage": {"prompt_tokens": 3, "total_tokens": 3}}\r\n', 3),
    ],
)
def test_answer_without_usage_costs_what_was_reserved(header: bytes, used: int) -> None:
    """vLLM's embeddings as plain bytes have it in a header, or not at all."""
    keys = [entry(ALICE, "alice", tokens_per_minute=100)]

    def client(url: str) -> None:
        with running(url, keys=keys) as gateway:
            assert complete(gateway).status == 200
            wait_for_value(lambda: gateway.metric("attnserve_key_tokens_total"), used, "settled")

    beside_server(says(OK.replace(b"\r\n", b"\r\n" + header, 1)), client)


def test_concurrency() -> None:
    keys = [entry(ALICE, "alice", max_concurrent=1)]
    with standin() as upstream, running(upstream.url, keys=keys) as gateway:
        upstream.before_s = 60.0
        first = open_request(gateway.url, BODY, authorization=f"Bearer {ALICE}")
        wait_for(lambda: upstream.running == 1, "it runs")
        answer = complete(gateway)
        assert (answer.status, error_of(answer)["code"]) == (429, "rate_limit_exceeded")
        assert answer.headers["retry-after-ms"] == "1000"
        leave(first)
        upstream.before_s = 0.0
        wait_for(lambda: complete(gateway).status == 200, "there is room again")


def test_bucket() -> None:
    bucket = Bucket(60.0)
    bucket.set(60, now=0.0)
    assert bucket.wait(60, now=0.0) == 0
    assert bucket.wait(61, now=0.0) == math.inf
    bucket.level -= 60
    assert bucket.wait(1, now=0.0) == pytest.approx(1.0)
    assert bucket.wait(10, now=4.0) == pytest.approx(6.0)
    bucket.set(30, now=4.0)  # a smaller limit: 56 of 30 are used
    assert bucket.wait(1, now=4.0) == pytest.approx(54.0)
    assert bucket.used(now=1e6) == 0


def test_reservations_add_up() -> None:
    account = Account()
    account.set(KeyEntry(name="a", sha256="0" * 64, tokens_per_minute=1000))
    reservations = [asyncio.run(account.reserve(20, 0.0)) for _ in range(50)]
    for reservation in reservations:
        account.settle(reservation, 5, 0.0)
    assert account.in_flight == 0
    assert account.buckets[1].level == pytest.approx(750, abs=50)  # 17 tokens come back each second


def test_no_secret_in_logs(
    capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    config = {"keys": [entry(ALICE, "alice")], "logging": {"level": "debug"}}
    with standin() as upstream, running(upstream.url, **config) as gateway:
        complete(gateway, prompt="a private prompt")
        complete(gateway, BOB)
        upstream.status = 400
        complete(gateway, stream=True)
        upstream.kill()
        complete(gateway)
        wait_for(lambda: "not healthy" in caplog.text, "it is noticed")
    text = caplog.text + json.dumps([vars(r) for r in caplog.records], default=str)
    text += json.dumps(request_lines(capsys))
    assert "alice" in text
    for secret in (ALICE, BOB, digest(ALICE), "a private prompt", " 0 1 2"):
        assert secret not in text


def test_answer_without_a_limit_is_limited_by_what_is_reserved() -> None:
    """For keys with a limit of tokens; vLLM writes until a model's context is full."""
    keys = [entry(ALICE, "alice", tokens_per_day=1000), entry(BOB, "bob", max_concurrent=9)]
    limits = {"default_max_tokens": 300}
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}]}
    with standin() as upstream, running(upstream.url, keys=keys, limits=limits) as gateway:
        for key, limit in ((ALICE, 300), (BOB, None)):
            bearer = f"Bearer {key}"
            answer = ask(gateway.url, "POST", "/v1/chat/completions", body, authorization=bearer)
            assert answer.status == 200
            assert upstream.seen[-1]["body"].get("max_completion_tokens") == limit


def test_events_of_many_tokens_cost_as_many() -> None:
    """Of a stream that ends without its usage, at most what was reserved for it."""
    keys = [entry(ALICE, "alice", tokens_per_minute=10_000)]
    with standin() as upstream, running(upstream.url, keys=keys) as gateway:
        upstream.break_after = 3
        for max_tokens, interval, used in ((50, "10", 30), (20, 10, 20), (20, None, 3)):
            before = gateway.metric("attnserve_key_tokens_total")
            fields: dict[str, Any] = {"stream": True, "max_tokens": max_tokens}
            fields["stream_interval"] = interval
            assert b"upstream_broken" in complete(gateway, **fields).body
            wait_for_value(
                lambda: gateway.metric("attnserve_key_tokens_total"), before + 10 + used, "settled"
            )
