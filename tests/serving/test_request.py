"""What is read of a body: anything at all is understood or refused, and goes on as it came."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from serving.config import Limits
from serving.openai.errors import ApiError
from serving.openai.request import MAX_TOKENS, ModelRequest, read_request


def request(**fields: Any) -> ModelRequest:
    return read_request(json.dumps({"model": "m", **fields}).encode(), Limits(), 8)


@pytest.mark.parametrize(
    ("fields", "prompt_tokens", "tokens"),
    [
        ({"prompt": "x" * 9}, 3, 3 + 16),
        ({"prompt": [1, 2, 3], "max_tokens": 5}, 3, 8),
        ({"prompt": ["abcd", "efg"], "max_tokens": 5, "n": 3}, 2, 2 + 2 * 15),
        ({"prompt": [[1, 2], [3]], "max_tokens": 5}, 3, 3 + 10),
        ({"prompt": "x", "max_tokens": 10**400}, 1, 1 + MAX_TOKENS),
        ({"prompt": "é" * 4, "max_tokens": 1}, 2, 3),
        ({"messages": [{"role": "u", "content": "abcdef"}], "max_tokens": 9}, 2, 11),
        ({"messages": [{"role": "u", "content": [{"text": "abcd"}]}]}, 2, 2 + 512),
        ({"messages": [], "max_completion_tokens": 7, "max_tokens": 9}, 0, 7),
        ({"input": ["abcd"], "max_tokens": 9}, 1, 1),
        ({"prompt": "x", "max_tokens": "many", "n": True}, 1, 17),
    ],
)
def test_tokens(fields: dict[str, Any], prompt_tokens: int, tokens: int) -> None:
    found = request(**fields)
    assert (found.prompt_tokens, found.tokens) == (prompt_tokens, tokens)


def test_prefix() -> None:
    assert request(prompt="0123456789").prefix == b"01234567"
    assert request(prompt=list(range(20))).prefix == b"[0, 1, 2, 3, 4, 5, 6, 7]"


def test_all_but_the_options_stays_byte_by_byte() -> None:
    raw = b' {"model":"m", "temperature":1.50, "stream":true, "big":12345678901234567890} \n'
    sent = read_request(raw, Limits(), 8).body
    assert sent == raw.rstrip()[:-1] + b',"stream_options":{"include_usage":true}}'


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)
FIELDS = ["prompt", "messages", "input", "max_tokens", "n", "stream", "stream_options", "model"]


@settings(max_examples=100, deadline=None)
@given(st.dictionaries(st.sampled_from(FIELDS), ANYTHING))
def test_any_json_is_read_or_refused(fields: dict[str, Any]) -> None:
    """Nothing but an ApiError, and a body that goes on says the same but for stream_options."""
    raw = json.dumps(fields).encode()
    try:
        request = read_request(raw, Limits(max_prompt_chars=50), 10)
    except ApiError as error:
        assert error.status == 400
        return
    assert request.tokens >= 0
    sent = json.loads(request.body)
    sent.pop("stream_options", None)
    fields.pop("stream_options", None)
    assert json.dumps(sent) == json.dumps(fields)
