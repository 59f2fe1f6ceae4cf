"""What is read of a body: anything at all is understood or refused, and goes on as it came."""

import asyncio
import json
import os
import signal
import time
from typing import Any

import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.config import Limits
from serving.large_bodies import LARGE_BODY, BodyReader
from serving.openai.bodies import BODIES, MAX_TOKENS
from serving.openai.errors import ApiError
from serving.openai.request import MAX_PARTS, ModelRequest, read_request
from tests.serving.standin import wait_for

COMPLETIONS, CHAT, EMBEDDINGS = "/v1/completions", "/v1/chat/completions", "/v1/embeddings"


def route_of(fields: dict[str, Any]) -> str:
    """Return the route whose field of the prompt is the first."""
    return {"messages": CHAT, "input": EMBEDDINGS}.get(next(iter(fields), ""), COMPLETIONS)


def request(limit_answer: bool = False, **fields: Any) -> ModelRequest:
    raw = json.dumps({"model": "m", **fields}).encode()
    return read_request(raw, route_of(fields), Limits(), 8, limit_answer)


def user(content: Any, **others: Any) -> list[dict[str, Any]]:
    return [{"role": "u", "content": content, **others}]


TEXT = "x" * 400
"""100 tokens, as the gateway guesses."""


@pytest.mark.parametrize(
    ("fields", "prompt_tokens", "tokens"),
    [
        ({"prompt": "x" * 9}, 3, 3 + 16),
        ({"prompt": [1, 2, 3], "max_tokens": 5}, 3, 8),
        ({"prompt": ["abcd", "efg"], "max_tokens": 5, "n": 3}, 2, 2 + 2 * 15),
        ({"prompt": [[1, 2], [3]], "max_tokens": 5}, 3, 3 + 10),
        ({"prompt": "x", "max_tokens": 10**400}, 1, 1 + MAX_TOKENS),
        ({"prompt": "é" * 4, "max_tokens": 1}, 2, 3),
        ({"messages": user("abcdef"), "max_tokens": 9}, 2, 11),
        ({"messages": user([{"text": "abcd"}])}, 2, 2 + 2048),
        ({"messages": [], "max_completion_tokens": 7, "max_tokens": 9}, 0, 7),
        ({"input": ["abcd"], "max_tokens": 9}, 1, 1),
        # What vLLM takes for a number.
        ({"prompt": "x", "max_tokens": "300", "n": "8"}, 1, 1 + 2400),
        ({"prompt": "x", "max_tokens": 400.0}, 1, 1 + 400),
        ({"prompt": "x", "max_tokens": True}, 1, 2),
        ({"prompt": [1, "2", 3.0], "max_tokens": 1}, 3, 4),  # one prompt
        ({"prompt": ["1", "2"], "max_tokens": 1}, 1, 3),  # two
        ({"prompt": "x", "max_tokens": None}, 1, 17),
        ({"prompt": "x", "max_tokens": 0, "echo": True}, 1, 2),
        ({"messages": [], "max_tokens": 5, "n": None}, 0, 5),
        # The fields that count, by route.
        ({"prompt": "x", "max_tokens": 400, "max_completion_tokens": 1}, 1, 401),
        ({"messages": [], "max_completion_tokens": None, "max_tokens": "9"}, 0, 9),
        ({"prompt": TEXT, "messages": [], "input": "x", "max_tokens": 1}, 100, 101),
        ({"messages": user(TEXT), "prompt": "x", "max_tokens": 1}, 101, 102),
        ({"input": TEXT, "prompt": "x"}, 100, 100),
        ({"input": "x", "messages": user(TEXT)}, 101, 101),
        ({"input": user(TEXT)}, 101, 101),
        ({"input": [user(TEXT), user(TEXT)]}, 202, 202),
        # All that the prompt is made of.
        ({"messages": user("", reasoning=TEXT), "max_tokens": 1}, 101, 102),
        ({"messages": user(None, tool_calls=[{"function": {"arguments": TEXT}}])}, 109, 2157),
        ({"messages": user("x"), "tools": [{"function": {"name": TEXT}}]}, 108, 2156),
        ({"messages": [], "chat_template_kwargs": {"a": TEXT}, "max_tokens": 1}, 103, 104),
        ({"messages": [], "documents": [{"text": TEXT}], "max_tokens": 1}, 104, 105),
        ({"messages": [], "kv_transfer_params": {"prompt_token_ids": [1] * 9}}, 9, 9 + 2048),
        ({"messages": user([{"image_url": {"url": TEXT}}]), "max_tokens": 1}, 1025, 1026),
        ({"messages": user([{"type": "prompt_embeds", "data": "x" * 4096}])}, 6, 6 + 2048),
        ({"prompt": ["a", "b"], "suffix": TEXT, "max_tokens": 1}, 201, 203),
        ({"prompt_embeds": ["x" * 2048, "x"], "max_tokens": 2}, 4, 8),
        ({"prompt": "", "prompt_embeds": "x", "max_tokens": 2}, 1, 5),  # two prompts
    ],
)
def test_tokens(fields: dict[str, Any], prompt_tokens: int, tokens: int) -> None:
    found = request(**fields)
    assert (found.prompt_tokens, found.tokens) == (prompt_tokens, tokens)


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"prompt": "x", "max_tokens": "many"}, "max_tokens"),
        ({"prompt": "x", "max_tokens": 1.5}, "max_tokens"),
        ({"prompt": "x", "n": None}, "n"),  # vLLM takes null in chats only
        ({"prompt": "x", "stream": "maybe"}, "stream"),
        ({"prompt": "x", "stream_options": {"include_usage": True}}, "stream_options"),
        ({"prompt": "x", "stream": True, "stream_options": 1}, "stream_options"),
        ({"prompt": ["a", 1]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": None, "messages": user("x"), "input": "x"}, "prompt"),
        ({"messages": user("x")[0]}, "messages"),
        ({"messages": ["x"]}, "messages"),
        ({"messages": None, "prompt": "x"}, "messages"),
        ({"input": None, "prompt": "x"}, "input"),
        ({"input": ["a", 1]}, "input"),
    ],
)
def test_what_vllm_refuses(fields: dict[str, Any], param: str) -> None:
    with pytest.raises(ApiError) as caught:
        request(**fields)
    assert (caught.value.status, caught.value.body["error"]["param"]) == (400, param)


def test_every_text_counts_for_the_longest_prompt() -> None:
    for fields in (
        {"messages": user("x"), "tools": [{"function": {"name": TEXT}}]},
        {"messages": user("x", reasoning_content=TEXT)},
        {"messages": user([{"type": "text", "text": TEXT}])},
        {"input": TEXT, "prompt": "x"},
        {"prompt": "x", "suffix": TEXT * 16},
    ):
        raw = json.dumps({"model": "m", **fields}).encode()
        with pytest.raises(ApiError, match="maximum length 399"):
            read_request(raw, route_of(fields), Limits(max_prompt_chars=399), 8)


def test_answers_of_keys_with_a_budget_end() -> None:
    """An answer is not longer than what is reserved for it."""
    chats: list[dict[str, Any]] = [{}, {"stream": 1, "max_tokens": None}]
    for fields in ({"messages": [], **chat} for chat in chats):
        assert "max_completion_tokens" not in json.loads(request(**fields).body)
        sent = json.loads(request(limit_answer=True, **fields).body)
        assert sent["max_completion_tokens"] == Limits().default_max_tokens
    limited = request(limit_answer=True, messages=[], max_tokens=5)
    assert "max_completion_tokens" not in json.loads(limited.body)


@pytest.mark.parametrize(
    ("options", "sent", "hidden"),
    [
        (None, {"include_usage": True}, True),
        ({}, {"include_usage": True, "continuous_usage_stats": False}, True),
        (
            {"include_usage": False, "continuous_usage_stats": True, "x": 1},
            {"include_usage": True, "continuous_usage_stats": False, "x": 1},
            True,
        ),
        ({"include_usage": "no"}, {"include_usage": True, "continuous_usage_stats": False}, True),
        ({"include_usage": "yes"}, {"include_usage": "yes"}, False),
        (
            {"include_usage": True, "continuous_usage_stats": True},
            {"include_usage": True, "continuous_usage_stats": True},
            False,
        ),
    ],
)
def test_usage_of_streams(options: Any, sent: Any, hidden: bool) -> None:
    """Without include_usage, vLLM answers without any usage at all."""
    found = request(prompt="x", stream="true", stream_options=options)
    assert found.stream and found.hide_usage is hidden
    assert json.loads(found.body)["stream_options"] == sent


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16", "utf-16-be", "utf-32-le"])
def test_encodings(encoding: str) -> None:
    text = '{"model": "m", "prompt": "é", "max_tokens": 4, "max_tokens": 5, "x": NaN, "stream": 1}'
    found = read_request(text.encode(encoding), COMPLETIONS, Limits(), 8)
    assert (found.stream, found.tokens) == (True, 6)  # the last of two fields counts
    sent = json.loads(found.body)
    assert (sent["prompt"], sent["stream_options"]) == ("é", {"include_usage": True})


@pytest.mark.parametrize("start", [b'{"prompt":[', b'{"prompt":{', b'{"messages":[{"x":'])
def test_small_values_without_end(start: bytes) -> None:
    """They would take a hundred times the body's size, and seconds."""
    item = b'"a%d":0' if start.endswith(b"{") else b"[]"
    raw = start + b",".join(item % i if b"%" in item else item for i in range(MAX_PARTS)) + b"]}"
    began = time.process_time()
    with pytest.raises(ApiError) as caught:
        read_request(raw, COMPLETIONS, Limits(), 8)
    assert caught.value.code == "body_too_complex"
    assert time.process_time() - began < 0.1


def test_prefix() -> None:
    assert request(prompt="0123456789").prefix == b"01234567"
    assert request(prompt=list(range(20))).prefix == b"[0, 1, 2, 3, 4, 5, 6, 7]"


def test_all_but_the_options_stays_byte_by_byte() -> None:
    raw = b' {"model":"m", "prompt":"x", "top_p":1.50, "stream":true, "x":12345678901234567890} \n'
    sent = read_request(raw, COMPLETIONS, Limits(), 8).body
    assert sent == raw.rstrip()[:-1] + b',"stream_options":{"include_usage":true}}'


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
FIELDS = ["prompt", "messages", "input", "max_tokens", "n", "stream", "stream_options", "model"]


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING), st.sampled_from(list(BODIES)))
def test_any_json_is_read_or_refused(fields: dict[str, Any], route: str) -> None:
    """Nothing but an ApiError, and a body that goes on says the same but for stream_options."""
    raw = json.dumps(fields).encode()
    try:
        request = read_request(raw, route, Limits(max_prompt_chars=50), 10)
    except ApiError as error:
        assert error.status == 400
        return
    assert request.tokens >= 0
    sent = json.loads(request.body)
    sent.pop("stream_options", None)
    fields.pop("stream_options", None)
    assert json.dumps(sent) == json.dumps(fields)


def process_of(raw: bytes) -> int:
    """Return the process that reads a body; one of zeros ends it, one of spaces is refused."""
    if raw[:1] == b"\0":
        os.kill(os.getpid(), signal.SIGKILL)
    if raw[:1] == b" ":
        raise ApiError(400, "no", code="c", param="p", retry_after=3.0)
    return os.getpid()


def test_large_bodies_are_read_in_another_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """One that is killed is replaced, and one without work ends."""

    async def read() -> None:
        reader = BodyReader()

        async def pid(start: bytes, size: int = LARGE_BODY + 1) -> int:
            return await reader.read(process_of, start.ljust(size, b"x"))

        assert await pid(b"x", LARGE_BODY) == os.getpid()
        first = await pid(b"x")
        assert first != os.getpid() and await pid(b"x") == first
        with pytest.raises(ApiError, match="no") as refused:
            await pid(b" ")
        error = refused.value
        assert (error.status, error.code, error.retry_after) == (400, "c", 3.0)
        assert error.body["error"]["param"] == "p"
        with pytest.raises(ApiError) as failed:
            await pid(b"\0")
        assert (failed.value.status, failed.value.code) == (503, "body_not_read")
        monkeypatch.setattr("serving.large_bodies.IDLE_SECONDS", 0.0)
        last = await pid(b"x")
        assert last not in (first, os.getpid())
        await asyncio.sleep(0.1)
        await asyncio.to_thread(wait_for, lambda: not psutil.pid_exists(last), "it ends")
        assert not psutil.pid_exists(first)

    asyncio.run(read())
