"""Shadow scoring in front of stand-ins: who is sampled, what the client sees, what is counted.

test_compare_vllm.py has it in front of real servers.
"""

import asyncio
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from starlette.types import Message

from serving.compare.shadow import Tap, suitable
from serving.config import Config, ShadowScoring
from tests.serving.helpers import HttpAnswer, Running, ask, leave, open_request, running
from tests.serving.standin import StandIn, standin, wait_for

SHADOW = {"reference": "a", "models": ["b"], "sample": 1}
BODY = {"model": "a", "prompt": "secret", "max_tokens": 3}


@contextmanager
def both(**config: Any) -> Iterator[tuple[Running, StandIn, StandIn]]:
    """Yield a gateway in front of models "a" and "b"."""
    with (
        standin("a") as a,
        standin("b") as b,
        running(**configuration(a, b, **config)) as gateway,
    ):
        yield gateway, a, b


def configuration(a: StandIn, b: StandIn, **config: Any) -> dict[str, Any]:
    """Its configuration."""
    models = [{"name": "a", "replicas": [a.url]}, {"name": "b", "bits": 4, "replicas": [b.url]}]
    return {"models": models, "shadow": SHADOW, **config}


def complete(gateway: Running, **fields: Any) -> HttpAnswer:
    """One completion of the reference."""
    return ask(gateway.url, "POST", "/v1/completions", {**BODY, **fields})


def counted(gateway: Running, result: str) -> float:
    """Answers for "b" of which this came."""
    labels = f'bits="4",model="b",result="{result}"'
    return gateway.metric(f"attnserve_shadow_answers_total{{{labels}")


def await_count(gateway: Running, result: str, count: int) -> None:
    """Wait until so many have come to this."""
    wait_for(lambda: counted(gateway, result) == count, f"{count} {result}")


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("usage", [False, True])
def test_the_client_sees_nothing_of_it(stream: bool, usage: bool) -> None:
    fields: dict[str, Any] = {"stream": stream}
    if stream and usage:
        fields["stream_options"] = {"include_usage": True}
    with both() as (gateway, a, _):
        sampled = complete(gateway, **fields)
        await_count(gateway, "read", 1)
        asked = a.seen[0]["body"]
        gateway.apply(**configuration(a, _, shadow=None))
        other = complete(gateway, **fields)
        wait_for(lambda: a.running == 0, "it has ended")
    assert asked["return_token_ids"] is True
    assert "return_token_ids" not in a.seen[-1]["body"]
    assert sampled.body == other.body
    assert sampled.status == other.status == 200
    assert sampled.headers.get("content-length") == other.headers.get("content-length")


def test_figures() -> None:
    with both() as (gateway, a, b):
        b.probabilities = (0.25, 0.5, 0.125)
        complete(gateway)
        await_count(gateway, "read", 1)
        kl = 0.5 * math.log(2) - 0.25 * math.log(2)
        for name, value in {
            "kl_count": 3,
            "kl_sum": 3 * kl,
            "tokens_total": 3,
            "disagreements_total": 3,
        }.items():
            line = f'attnserve_shadow_{name}{{bits="4",model="b",variant=""}}'
            assert gateway.metric(line) == pytest.approx(value), name
        for bound, count in {"-1.0": 0, "-0.3": 3, "+Inf": 3}.items():  # they are all -ln 2
            line = f'attnserve_shadow_logprob_delta_bucket{{bits="4",le="{bound}",model="b"'
            assert gateway.metric(line) == count
        # What the clients' requests took does not include it.
        assert gateway.metric("attnserve_prompt_tokens_total{") == 7
        assert gateway.metric('attnserve_requests_total{bits="4"') == 0
        read = [s.seen[-1]["body"] for s in (a, b)]
        assert [r["prompt"] for r in read] == [[7, 8, 9, 0, 1, 2]] * 2


def test_it_waits_for_nobody_and_nobody_for_it() -> None:
    with both() as (gateway, a, b):
        b.before_s = 60.0
        assert complete(gateway).status == 200
        wait_for(lambda: b.running == 1, "b reads")
        assert complete(gateway).status == 200
        assert counted(gateway, "busy") == 1
        gateway.apply(**configuration(a, b, limits={"max_concurrent_per_replica": 1}))
        assert complete(gateway).status == 200
        await_count(gateway, "busy", 2)


def test_clients_go_first() -> None:
    """No reading is begun at a server without room."""
    with both() as (gateway, _, b):
        b.waiting = 99
        wait_for(lambda: gateway.metric("attnserve_replica_waiting{") == 99, "it is known")
        complete(gateway)
        await_count(gateway, "busy", 1)
        assert not b.seen


def test_long_ones_are_left_out() -> None:
    with both(shadow={**SHADOW, "max_tokens": 6}) as (gateway, _, b):
        complete(gateway, max_tokens=4)
        await_count(gateway, "too_long", 1)
        complete(gateway, max_tokens=3)
        await_count(gateway, "read", 1)
        assert len(b.seen) == 1


def test_failures_reach_no_client(caplog: pytest.LogCaptureFixture) -> None:
    with both() as (gateway, a, b):
        b.status = 400
        assert complete(gateway).status == 200
        await_count(gateway, "failed", 1)
        b.status, b.vocabulary = 200, "u"
        assert complete(gateway).status == 200
        await_count(gateway, "vocabulary_mismatch", 1)
        b.kill()
        assert complete(gateway).status == 200
        await_count(gateway, "failed", 2)
        a.status = 500
        assert complete(gateway).status == 500
        a.status, a.break_after = 200, 1
        assert b"error" in complete(gateway, stream=True).body
    results = [r for r in caplog.records if r.message == "shadow scoring failed"]
    assert len(results) == 3
    assert all(r.levelno == logging.WARNING for r in results)
    assert "secret" not in json.dumps([str(vars(r)) for r in caplog.records])


def test_a_client_that_leaves_is_not_read() -> None:
    with both() as (gateway, a, b):
        a.between_s = 20.0
        client = open_request(gateway.url, {**BODY, "stream": True})
        assert client.getresponse().readline().startswith(b"data: ")
        leave(client)
        wait_for(lambda: a.aborted == 1, "it is freed")
        assert not b.seen


def test_only_samples_of_the_reference() -> None:
    with both(shadow={**SHADOW, "sample": 0}) as (gateway, a, b):
        complete(gateway)
        assert "return_token_ids" not in a.seen[0]["body"]
        gateway.apply(**configuration(a, b))
        complete(gateway, model="b")
        assert "return_token_ids" not in b.seen[0]["body"]
        gateway.apply(**configuration(a, b, shadow={**SHADOW, "sample": 0.5}))
        for _ in range(60):
            complete(gateway, max_tokens=1)
        wrote = [r["body"] for r in a.seen if "prompt_logprobs" not in r["body"]]
        sampled = sum("return_token_ids" in body for body in wrote)
        assert 5 < sampled < 55  # by chance otherwise once in 10^11


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"prompt": "x"}, True),
        ({"prompt": [1, 2]}, True),
        ({"prompt": ["x"]}, False),
        ({"prompt": [[1, 2]]}, False),
        ({"prompt": "x", "n": 1, "echo": False, "return_token_ids": None}, True),
        ({"prompt": "x", "n": 2}, False),
        ({"prompt": "x", "echo": True}, False),
        ({"prompt": "x", "return_token_ids": True}, False),
        ({}, False),
        ({"messages": [{"content": "x"}, {"content": None}]}, True),
        ({"messages": [{"content": [{"type": "text", "text": "x"}]}]}, True),
        ({"messages": [{"content": [{"type": "image_url", "image_url": {}}]}]}, False),
        ({"messages": "x"}, False),
    ],
)
def test_what_is_suitable(fields: dict[str, Any], expected: bool) -> None:
    assert suitable(fields) == expected


def test_ids_inside_an_answer_are_text() -> None:
    """What a model writes about token ids stays as it wrote it."""
    with both() as (gateway, a, _):
        a.text = '"token_ids": [1, 2]'
        sampled = complete(gateway)
        await_count(gateway, "read", 1)
        assert sampled.json()["choices"][0]["text"] == a.text
        assert sampled.json()["choices"][0]["token_ids"] is None


@pytest.mark.parametrize("ids", [",,", "1 2", "9" * 5000, ""])
def test_ids_that_are_none_do_no_harm(ids: str) -> None:
    sent = []

    async def send(message: Message) -> None:
        sent.append(message)

    async def answer() -> None:
        tap = Tap(send)
        await tap.send({"type": "http.response.start", "status": 200, "headers": []})
        body = b'{"token_ids": [%b]}' % ids.encode()
        await tap.send({"type": "http.response.body", "body": body, "more_body": False})

    asyncio.run(answer())
    assert sent[1]["body"] == b'{"token_ids": null}'


@pytest.mark.parametrize(
    ("shadow", "said"),
    [
        ({**SHADOW, "reference": "c"}, "shadow names c, which is none of the models"),
        ({**SHADOW, "models": ["b", "b"]}, "shadow.models has b twice"),
        ({**SHADOW, "models": []}, "at least 1 item"),
        ({**SHADOW, "sample": 1.5}, "less than or equal to 1"),
    ],
)
def test_nonsense_is_refused(shadow: dict[str, Any], said: str) -> None:
    models = [{"name": n, "replicas": ["http://127.0.0.1:1"]} for n in "ab"]
    with pytest.raises(ValueError, match=said):
        Config.model_validate({"models": models, "shadow": shadow})


def test_docs_name_every_setting_and_its_default() -> None:
    text = (Path(__file__).parents[2] / "docs/GATEWAY.md").read_text()
    for name, field in ShadowScoring.model_fields.items():
        default = "" if field.is_required() else f" {field.default}"
        assert f"| `shadow.{name}` |{default} |" in text
