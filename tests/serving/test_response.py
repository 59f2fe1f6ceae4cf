"""Whole answers: vLLM's nulls become what OpenAI's schema has, all else stays byte by byte."""

import json

import pytest

from serving.openai.response import usage_of, without_nulls

TEXT = 'it says "annotations":null, and ,"service_tier":null'
ANSWER = {
    "choices": [
        {
            "message": {
                "content": TEXT,
                "refusal": None,
                "annotations": None,
                "function_call": None,
            },
            "logprobs": None,
        }
    ],
    "service_tier": None,
    "usage": {"prompt_tokens": 1, "prompt_tokens_details": None, "completion_tokens_details": None},
}


def test_nulls_that_openai_does_not_have() -> None:
    answer = json.loads(without_nulls(json.dumps(ANSWER, separators=(",", ":")).encode()))
    assert answer == {
        "choices": [
            {"message": {"content": TEXT, "refusal": None, "annotations": []}, "logprobs": None}
        ],
        "usage": {"prompt_tokens": 1},
    }


def test_what_has_none_is_the_same() -> None:
    body = b'{"choices":[{"message":{"annotations":[{}]}}],"service_tier":"auto"}'
    assert without_nulls(body) == body


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"usage": {"completion_tokens": 2, "prompt_tokens": 1}}', (1, 2)),
        (b'{"usage":{"prompt_tokens":8,"total_tokens":8}}', (8, 0)),
        (b'{"usage":{"prompt_tokens":3,"completion_tokens":2},"a":[{"decoded":"usage"}]}', (3, 2)),
        (b'{"usage":{"prompt_tokens":3},"top":{"usage":-1,"prompt_tokens":9}}', (3, 0)),
        (b'["usage","usage"]', None),
        (b'{"usage":null}', None),
        (b'{"text":"\\"usage\\":{\\"prompt_tokens\\":9}"}', None),
        (b"", None),
    ],
)
def test_usage(body: bytes, expected: tuple[int, int] | None) -> None:
    assert usage_of(body) == expected
