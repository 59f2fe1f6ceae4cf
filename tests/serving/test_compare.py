"""/v1/compare in front of stand-ins: its figures by hand, its errors, limits, retries and aborts.

test_compare_vllm.py has it in front of real servers.
"""

import asyncio
import json
import math
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

from serving.auth import digest, new_key
from serving.compare.kl import Position, drift, positions
from serving.compare.scoring import token_ids, tokenized
from serving.upstream.vllm_metrics import kv_cache_sizes
from tests.servers import free_port
from tests.serving.helpers import HttpAnswer, Running, ask, error_of, leave, open_request, running
from tests.serving.standin import StandIn, standin, wait_for

BODY = {"reference": "a", "prompt": "hello", "max_tokens": 3}


@contextmanager
def both(**config: Any) -> Iterator[tuple[Running, StandIn, StandIn]]:
    """Yield a gateway in front of models "a" and "b"."""
    with standin("a") as a, standin("b") as b:
        models = [{"name": "a", "replicas": [a.url]}, {"name": "b", "bits": 4, "replicas": [b.url]}]
        with running(models=models, **config) as gateway:
            yield gateway, a, b


@pytest.fixture(scope="module")
def pair() -> Iterator[tuple[Running, StandIn, StandIn]]:
    """One for tests that leave it as it was."""
    with both() as found:
        yield found


def compare(gateway: Running, headers: dict[str, str] | None = None, **fields: Any) -> HttpAnswer:
    """One comparison."""
    return ask(gateway.url, "POST", "/v1/compare", {**BODY, **fields}, **(headers or {}))


def test_figures_by_hand() -> None:
    with both() as (gateway, _, b):
        b.probabilities = (0.25, 0.5, 0.125)
        answer = compare(gateway, headers={"x_request_id": "mine"})
        whole = answer.json()
    assert (answer.status, whole["object"], whole["id"]) == (200, "compare", "mine")
    assert whole["prompt_token_ids"] == [7, 8, 9]
    assert [t["token"] for t in whole["reference"]["tokens"]] == ["t0", "t1", "t2"]
    (model,) = whole["models"]
    assert (model["model"], model["bits"]) == ("b", 4)
    for token in model["tokens"]:
        assert token["delta"] == pytest.approx(math.log(0.25 / 0.5))
        expected = 0.5 * math.log(0.5 / 0.25) + 0.25 * math.log(0.25 / 0.5)
        assert token["kl"] == pytest.approx(expected)
        assert token["coverage"] == pytest.approx(0.875)
        assert token["agrees"] is False
    assert [t["id"] for t in model["tokens"][0]["top"]] == [1, 0, 2]
    assert model["summary"]["agreement"] == 0 and model["summary"]["first_divergence"] == 0
    assert model["generation"]["text"] == whole["reference"]["generation"]["text"] == " 0 1 2"
    assert model["kv"] == dict.fromkeys(model["kv"])  # a stand-in does not say


def position(id: int, **named: float) -> Position:
    """Return a position whose named tokens have these probabilities, by ids written as `_ID`."""
    logs = {int(k[1:]): math.log(p) for k, p in named.items()}
    return Position(id, dict(sorted(logs.items(), key=lambda x: -x[1])), {})


def test_kl_merges_what_not_both_name() -> None:
    p = position(1, _1=0.5, _2=0.3, _3=0.1)
    q = position(1, _1=0.25, _2=0.45, _4=0.2)
    found = drift(p, q)
    rest = 0.2 * math.log(0.2 / 0.3)
    expected = 0.5 * math.log(0.5 / 0.25) + 0.3 * math.log(0.3 / 0.45) + rest
    assert found.kl == pytest.approx(expected)
    assert found.coverage == pytest.approx(0.8)
    assert found.agrees is False
    assert found.delta == pytest.approx(math.log(0.5))


def test_kl_is_finite_where_a_model_leaves_nothing_to_the_rest() -> None:
    sure, unsure = position(1, _1=1.0), position(1, _1=0.5)
    assert drift(sure, unsure).kl == pytest.approx(math.log(2))
    assert 5 < drift(unsure, sure).kl < 20
    assert drift(sure, sure).kl == 0


def test_impossible_tokens_are_finite() -> None:
    entry = {"1": {"logprob": -9999.0}, "2": {"logprob": 0.0}}
    answer = b'{"choices": [{"prompt_logprobs": [null, %b]}]}'
    (one,) = positions(answer % str(entry).replace("'", '"').encode(), [5, 1], 1)
    assert drift(one, one).kl == 0
    assert drift(position(1, _1=0.5, _2=0.5), one).kl == pytest.approx(0.5 * 9999, rel=1e-3)


@pytest.mark.parametrize("entry", [
    "null", "{}", '{"2": {"logprob": 0}}', '{"1": {}}', "[]", '{"1": {"logprob": NaN}}',
    '{"1": {"logprob": -1e999}}', '{"1": {"logprob": 1e308}}',
    '{"1": {"logprob": 1%s}}' % (400 * "0"),
    '{"x": {"logprob": 0}}', "[" * 100_000,
])  # fmt: skip
def test_answers_without_the_tokens_logprob_are_errors(entry: str) -> None:
    with pytest.raises(ValueError, match="no logprobs"):
        positions(b'{"choices": [{"prompt_logprobs": [null, %b]}]}' % entry.encode(), [5, 1], 1)


def test_kv_cache_as_vllm_says_it() -> None:
    line = 'vllm:cache_config_info{block_size="128",kv_cache_max_concurrency="%s",%s} 1.0\n'
    size = 'kv_cache_memory_bytes="%s",kv_cache_size_tokens="16384",num_cpu_blocks="None"'
    assert kv_cache_sizes((line % ("32.0", size % 67108864)).encode()) == {
        "bytes_per_token": 4096.0,
        "bytes_per_request": 2097152.0,
        "cache_bytes": 67108864,
        "cache_tokens": 16384,
    }
    unknown = kv_cache_sizes((line % ("None", size % "None")).encode())
    assert unknown == {**dict.fromkeys(unknown), "cache_tokens": 16384}
    assert set(kv_cache_sizes(b"").values()) == {None}


def test_what_the_servers_are_asked() -> None:
    with both() as (gateway, a, b):
        compare(gateway, temperature=0.5, seed=3, top_k=2, custom=1)
        paths = [r["path"] for r in a.seen]
        tokenize, wrote, read = (r["body"] for r in a.seen)
        assert paths == ["/tokenize", "/v1/completions", "/v1/completions"]
        assert tokenize == {"model": "a", "prompt": "hello", "add_special_tokens": True}
        assert (wrote["prompt"], wrote["stream"], wrote["max_tokens"]) == ([7, 8, 9], True, 3)
        assert (wrote["temperature"], wrote["seed"], wrote["custom"]) == (0.5, 3, 1)
        assert (read["prompt"], read["prompt_logprobs"]) == ([7, 8, 9, 0, 1, 2], 2)
        salts = {r["body"].pop("cache_salt") for r in (a.seen[1], b.seen[0])}
        assert len(salts) == 2  # neither finds the prompt in its prefix cache
        assert {**wrote, "model": "b"} == b.seen[0]["body"]
        assert {**read, "model": "b"} == b.seen[1]["body"]
        ids = [r["headers"]["x-request-id"] for r in [*a.seen, *b.seen]]
        assert len(set(ids)) == 5
        compare(gateway, generate=False, prompt=[7, 8])
        assert [len(s.seen) for s in (a, b)] == [5, 3]  # one more each reads, one writes


def test_models_are_all_others_by_default(pair: tuple[Running, StandIn, StandIn]) -> None:
    gateway, _, _ = pair
    assert [m["model"] for m in compare(gateway).json()["models"]] == ["b"]
    chosen = compare(gateway, models=["b", "a"]).json()["models"]
    assert [m["model"] for m in chosen] == ["b", "a"]
    assert chosen[1]["summary"]["max_kl"] == 0


@pytest.mark.parametrize(
    ("fields", "status", "param"),
    [
        ({"reference": None}, 400, "reference"),
        ({"reference": 1}, 400, "reference"),
        ({"reference": "c"}, 404, None),
        ({"models": ["c"]}, 404, None),
        ({"models": []}, 400, "models"),
        ({"models": ["b", "b"]}, 400, "models"),
        ({"models": "b"}, 400, "models"),
        ({"models": [f"b{i}" for i in range(33)]}, 400, "models"),
        ({"prompt": None}, 400, "prompt"),
        ({"prompt": ""}, 400, "prompt"),
        ({"prompt": ["x", "y"]}, 400, "prompt"),
        ({"prompt": [1, -1]}, 400, "prompt"),
        ({"messages": [{"content": "x"}]}, 400, "prompt"),
        ({"prompt": None, "messages": ["x"]}, 400, "messages"),
        ({"prompt": None, "messages": [{"content": [{"type": "image_url"}]}]}, 400, "messages"),
        ({"max_tokens": 0}, 400, "max_tokens"),
        ({"max_tokens": 4094}, 400, "max_tokens"),
        ({"max_tokens": 4097}, 400, "max_tokens"),
        ({"max_tokens": 10**400}, 400, "max_tokens"),
        ({"prompt": [1], "max_tokens": 10**4300 - 1}, 400, "max_tokens"),  # one more: no text
        ({"max_tokens": 1000, "models": [f"b{i}" for i in range(16)]}, 400, "models"),
        ({"max_tokens": "3"}, 400, "max_tokens"),
        ({"top_k": True}, 400, "top_k"),
        ({"generate": 1}, 400, "generate"),
        ({"stream": True}, 400, "stream"),
        ({"n": 2}, 400, "n"),
        ({"prompt_embeds": "x"}, 400, "prompt_embeds"),
    ],
)
def test_what_is_refused(
    pair: tuple[Running, StandIn, StandIn], fields: dict[str, Any], status: int, param: str | None
) -> None:
    gateway, a, b = pair
    seen = len(a.seen), len(b.seen)
    answer = compare(gateway, **fields)
    assert (answer.status, error_of(answer)["param"]) == (status, param)
    # That a text's three tokens are too many is known once they are counted.
    asked = a.seen[seen[0] :] + b.seen[seen[1] :]
    assert [r["path"] for r in asked] == ["/tokenize"] * (fields == {"max_tokens": 4094})


def test_deeply_nested_fields(pair: tuple[Running, StandIn, StandIn]) -> None:
    """What can just be parsed may not go into a body for a model any more."""
    statuses = []
    for depth in range(900, 1000):
        raw = b'{"reference":"a","prompt":"x","max_tokens":1,"x":%b}' % (
            b"[" * depth + b"]" * depth
        )
        statuses.append(ask(pair[0].url, "POST", "/v1/compare", raw).status)
    assert set(statuses) == {200, 400} and statuses == sorted(statuses)


def test_other_vocabularies() -> None:
    with both() as (gateway, _, b):
        b.vocabulary = "u"
        error = error_of(answer := compare(gateway))
    assert (answer.status, error["code"], error["param"]) == (400, "vocabulary_mismatch", "models")
    assert "b has another vocabulary than a" in error["message"]


@pytest.mark.parametrize("generate", [True, False])
def test_smaller_vocabularies(generate: bool) -> None:
    """A model that has no such token says so when it writes, and when it reads."""
    with both() as (gateway, _, b):
        b.message = "Token id 9 is out of vocabulary"
        if generate:
            b.first_event = json.dumps({"error": {"message": b.message, "type": "x", "code": 400}})
        else:
            b.status = 400
        error = error_of(answer := compare(gateway, generate=generate))
    assert (answer.status, error["code"], error["param"]) == (400, "vocabulary_mismatch", "models")
    assert error["message"] == "b: Token id 9 is out of vocabulary"


def test_a_failing_model_is_named() -> None:
    with both() as (gateway, _, b):
        for status in (400, 429, 500, 503):
            b.status = status
            answer = compare(gateway)
            assert answer.status == status
            assert error_of(answer)["message"] == "b: no"
            assert ("retry-after" in answer.headers) == (status in (429, 503))
        b.status = 200
        b.first_event = '{"error": {"message": "no", "type": "x", "code": 400}}'
        answer = compare(gateway)
        assert (answer.status, error_of(answer)["message"]) == (400, "b: no")
        b.first_event, b.break_after = None, 1
        answer = compare(gateway)
        assert (answer.status, error_of(answer)["code"]) == (502, "upstream_broken")
        b.kill()
        answer = compare(gateway)
        assert (answer.status, error_of(answer)["code"]) == (503, "upstream_unreachable")


@pytest.mark.parametrize("event", [
    '{"choices": 5}', '{"choices": [1]}', '{"choices": [{"text": 5, "token_ids": [1]}]}',
    '{"choices": [{"token_ids": "abc"}]}', '{"choices": [{"token_ids": [1e999]}]}',
    '{"choices": [{"token_ids": [[1], null]}]}', '{"choices": [{"token_ids": [-1]}]}',
])  # fmt: skip
def test_answers_that_make_no_sense_are_the_servers_fault(event: str) -> None:
    with both() as (gateway, a, _):
        a.first_event = event
        answer = compare(gateway)
        assert answer.status == 502 and error_of(answer)["message"].startswith("a: ")


def test_a_servers_code_is_no_label() -> None:
    with both() as (gateway, a, _):
        a.first_event = '{"error": {"message": "no", "code": "made-up"}}'
        assert error_of(compare(gateway))["code"] == "made-up"
        assert b"made-up" not in ask(gateway.url, "GET", "/metrics").body


def test_what_tokenize_may_say() -> None:
    assert token_ids([1, 2]) == [1, 2]
    for value in (None, "12", {"1": 2}, [1.0], [True], [-1], [2**31], ["1"], [math.inf]):
        with pytest.raises(ValueError):
            token_ids(value)


def test_large_answers_are_read_in_another_process(
    pair: tuple[Running, StandIn, StandIn], monkeypatch: pytest.MonkeyPatch
) -> None:
    gateway, *_ = pair
    small = compare(gateway).json()
    assert gateway.state.bodies._pool is None
    monkeypatch.setattr("serving.large_bodies.LARGE_BODY", 0)
    large = compare(gateway).json()
    assert gateway.state.bodies._pool is not None
    for answer in (small, large):
        assert len(answer["reference"]["tokens"]) == 3
    assert large["prompt_token_ids"] == small["prompt_token_ids"]
    assert large["reference"]["tokens"] == small["reference"]["tokens"]
    assert large["models"][0]["tokens"] == small["models"][0]["tokens"]
    deep: list[Any] = []
    for _ in range(800):  # can be parsed there, but not be pickled
        deep = [deep]
    assert "could not parse" in error_of(compare(gateway, logit_bias=deep))["message"]

    async def read_nonsense() -> None:
        with pytest.raises(ValueError):
            await gateway.state.bodies.read(positions, b"{}", [1], 0)
        with pytest.raises(ValueError):
            await gateway.state.bodies.read(tokenized, b"{}")

    loop = gateway.server.servers[0].get_loop()
    asyncio.run_coroutine_threadsafe(read_nonsense(), loop).result(60)


def test_one_replica_stands_in_for_another() -> None:
    with standin("a") as a, standin("b") as bad, standin("b") as good:
        bad.status = 503
        models = [
            {"name": "a", "replicas": [a.url]},
            {"name": "b", "replicas": [bad.url, good.url]},
        ]
        with running(models=models) as gateway:
            assert compare(gateway).status == 200
            assert gateway.metric('attnserve_retries_total{bits="",model="b"') > 0


def test_keys_and_tokens() -> None:
    """Everything that it can take is reserved, what it took is settled, over all models."""
    key = new_key()
    keys = [{"name": "k", "sha256": digest(key), "tokens_per_minute": 1000}]
    bearer = {"authorization": f"Bearer {key}"}
    with both(keys=keys) as (gateway, a, _):
        assert compare(gateway).status == 401
        assert compare(gateway, headers=bearer, max_tokens=400).status == 429
        assert not a.seen
        answer = compare(gateway, headers=bearer)
        used = answer.json()["usage"]["total_tokens"]
        # Each stand-in says that it got 7 tokens, twice, and wrote 3 and 1.
        assert used == 2 * (2 * 7 + 3 + 1)
        assert gateway.metric('attnserve_key_tokens_total{key="k"}') == used
        for model, bits in (("a", ""), ("b", "4")):
            labels = f'{{bits="{bits}",model="{model}",variant=""}}'
            assert gateway.metric(f"attnserve_prompt_tokens_total{labels}") == 14
            assert gateway.metric(f"attnserve_completion_tokens_total{labels}") == 4
        route = 'attnserve_requests_total{bits="",model="a",route="/v1/compare",status="200"'
        assert gateway.metric(route) == 1
        account = gateway.state.keys.account(bearer["authorization"].encode())
        assert account is not None and account.in_flight == 0
        assert 1000 - used <= account.buckets[1].level <= 1000 - used + 50  # it refills meanwhile


def test_cost() -> None:
    """At most that of all tokens at the highest price is reserved; settled by each model's own."""
    key = new_key()
    keys = [{"name": "k", "sha256": digest(key), "cost_per_day": 1.0}]
    bearer = {"authorization": f"Bearer {key}"}
    with standin("a") as a, standin("b") as b:
        prices = {"a": (1000, 10_000), "b": (0, 5000)}
        models = [
            {"name": s.models[0], "replicas": [s.url], "prompt_price": p, "completion_price": c}
            for s, (p, c) in ((s, prices[s.models[0]]) for s in (a, b))
        ]
        with running(models=models, keys=keys) as gateway:
            assert compare(gateway, headers=bearer, max_tokens=60).status == 429
            assert not a.seen
            assert compare(gateway, headers=bearer).status == 200
            account = gateway.state.keys.account(bearer["authorization"].encode())
            assert account is not None
            used = 14 * 0.001 + 4 * 0.01 + 4 * 0.005
            assert 1 - account.buckets[3].level == pytest.approx(used, abs=1e-3)


@pytest.mark.parametrize("stage", ["tokenize", "write", "read"])
def test_client_that_leaves_frees_all(stage: str) -> None:
    with both() as (gateway, a, b):
        if stage == "tokenize":
            a.before_s = 60.0
        elif stage == "write":
            a.between_s = 20.0
        else:
            b.before_s = 60.0
        fields = {"generate": False, "models": ["b"]}
        client = open_request(gateway.url, {**BODY, **fields}, path="/v1/compare")
        slow = b if stage == "read" else a
        wait_for(lambda: slow.running == 1, "it runs")
        leave(client)
        wait_for(lambda: slow.aborted == 1 and a.running == b.running == 0, "all are freed")
        wait_for(lambda: gateway.metric("attnserve_replica_in_flight{") == 0, "it is noticed")
        assert gateway.metric('attnserve_aborts_total{bits="",model="a",stage="whole"') == 1


def test_one_failure_ends_the_other_requests() -> None:
    with standin("a") as a, standin("b") as b:
        c = f"http://127.0.0.1:{free_port()}"  # nobody is there
        models = [{"name": n, "replicas": [u]} for n, u in (("a", a.url), ("b", b.url), ("c", c))]
        with running(models=models) as gateway:
            b.before_s = 60.0
            answer = compare(gateway, generate=False)
            assert (answer.status, error_of(answer)["code"]) == (503, "upstream_unreachable")
            assert error_of(answer)["message"].startswith("c: ")
            wait_for(lambda: b.running == 0, "b is freed")


def test_it_is_documented(pair: tuple[Running, StandIn, StandIn]) -> None:
    document = ask(pair[0].url, "GET", "/openapi.json").json()
    schema = document["paths"]["/v1/compare"]["post"]["requestBody"]["content"]
    assert schema["application/json"]["schema"]["required"] == ["reference"]
