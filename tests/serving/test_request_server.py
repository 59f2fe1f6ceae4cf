"""The gateway reads requests as a real vLLM server does: the same verdicts, tokens and usage."""

import json
from typing import Any

import pytest

from serving.auth import digest, new_key
from tests.servers import Server
from tests.serving.helpers import MODEL, HttpAnswer, ask, error_of, running

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"
GREEDY = {"model": MODEL, "temperature": 0, "ignore_eos": True}


def both(gateway: Server, upstream: Server, path: str, body: Any) -> tuple[HttpAnswer, HttpAnswer]:
    """Return the answers of the gateway and of vLLM itself."""
    return ask(gateway.url, "POST", path, body), ask(upstream.url, "POST", path, body)


@pytest.mark.parametrize(
    ("fields", "tokens"),
    [
        ({"prompt": "x", "max_tokens": "3", "n": "2", "temperature": 1}, 6),
        ({"prompt": "x", "max_tokens": 4.0}, 4),
        ({"prompt": "x", "max_tokens": True}, 1),
        ({"prompt": "x", "max_tokens": None}, 16),
        ({"prompt": "x", "max_tokens": 3, "max_completion_tokens": 1}, 3),
        ({"prompt": "x", "max_tokens": 3, "messages": []}, 3),
        ({"prompt": [5, "6", 7.0], "max_tokens": 3}, 3),
        ({"prompt": ["5", "6"], "max_tokens": 3}, 6),
        ({"prompt": "x", "max_tokens": 2, "n": 3, "use_beam_search": "yes"}, 6),
        ({"prompt": "x", "max_tokens": "many"}, 400),
        ({"prompt": "x", "max_tokens": 2.5}, 400),
        ({"prompt": "x", "n": None}, 400),
        ({"prompt": "x", "stream": "perhaps"}, 400),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, 400),
        ({"prompt": ["x", 5]}, 400),
        ({"messages": [{"role": "user", "content": "x"}]}, 400),
    ],
)
def test_verdicts_and_tokens(
    gateway: Server, upstream: Server, fields: dict[str, Any], tokens: int
) -> None:
    through, direct = both(gateway, upstream, COMPLETIONS, {**GREEDY, **fields})
    assert through.status == direct.status == (400 if tokens == 400 else 200)
    if tokens == 400:
        assert error_of(through)["param"] in fields or error_of(through)["param"] == "prompt"
    else:
        for answer in (through, direct):
            assert answer.json()["usage"]["completion_tokens"] == tokens


@pytest.mark.parametrize("stream", [True, "true", "on", 1, 1.0, "false", 0, None])
def test_streams(gateway: Server, upstream: Server, stream: Any) -> None:
    body = {**GREEDY, "prompt": "x", "max_tokens": 2, "stream": stream}
    through, direct = both(gateway, upstream, COMPLETIONS, body)
    assert through.status == direct.status == 200
    assert through.headers["content-type"] == direct.headers["content-type"]


@pytest.mark.parametrize(
    "options",
    [
        {"include_usage": False, "continuous_usage_stats": True},
        {"include_usage": True, "continuous_usage_stats": True},
        {"include_usage": "no", "continuous_usage_stats": "yes"},
        {"include_usage": 1},
        {"continuous_usage_stats": True},
        {},
        None,
    ],
)
def test_usage_of_streams(gateway: Server, upstream: Server, options: Any) -> None:
    """In the same events as vLLM's own."""
    body = {**GREEDY, "prompt": "x", "max_tokens": 4, "stream": True, "stream_options": options}

    def usages(answer: HttpAnswer) -> list[bool]:
        events = answer.body.decode().split("\n\n")
        read = [json.loads(e[6:]) for e in events if e.startswith("data: {")]
        whole = [e for e in read if e["choices"] == []]
        return [any(e.get("usage") for e in read if e["choices"]), len(whole) > 0]

    through, direct = both(gateway, upstream, COMPLETIONS, body)
    assert usages(through) == usages(direct)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-32-be"])
@pytest.mark.parametrize("stream", [False, True])
def test_encodings(gateway: Server, upstream: Server, encoding: str, stream: bool) -> None:
    fields = {**GREEDY, "prompt": "é", "max_tokens": 2, "stream": stream}
    text = json.dumps(fields, ensure_ascii=False).replace("2,", '1, "max_tokens": 2,')
    through, direct = both(gateway, upstream, COMPLETIONS, text.encode(encoding))
    assert through.status == direct.status == 200
    if not stream:
        assert through.json()["usage"]["completion_tokens"] == 2
        assert through.json()["choices"] == direct.json()["choices"]


@pytest.mark.parametrize(
    ("path", "fields"),
    [
        (COMPLETIONS, {"prompt": "x", "max_tokens": "300", "n": "8"}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 400.0}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 400, "max_completion_tokens": 1}),
        (COMPLETIONS, {"prompt": "x" * 200, "max_tokens": 1, "messages": []}),
        (COMPLETIONS, {"prompt": "x", "max_tokens": 400, "stream": "true"}),
        (COMPLETIONS, {"prompt": ["x"] * 9, "max_tokens": "9", "use_beam_search": True}),
        (CHAT, {"messages": [{"role": "user", "content": "x", "reasoning": "y" * 200}]}),
        (EMBEDDINGS, {"prompt": "x", "input": "x" * 200}),
    ],
)
def test_no_way_around_a_budget(upstream: Server, path: str, fields: dict[str, Any]) -> None:
    key = new_key()
    entry = {"name": "k", "sha256": digest(key), "tokens_per_minute": 40}
    models = [{"name": MODEL, "replicas": [upstream.url]}]
    with running(models=models, keys=[entry]) as gateway:
        body = {"model": MODEL, **fields}
        answer = ask(gateway.url, "POST", path, body, authorization=f"Bearer {key}")
        assert (answer.status, error_of(answer)["code"]) == (429, "rate_limit_exceeded")
