"""vLLM's nulls become what OpenAI's schema has; everything else stays as it is, byte by byte."""

import json

from serving.shape import without_nulls

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
