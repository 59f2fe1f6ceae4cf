"""vLLM's nulls become what OpenAI's schema has; everything else stays as it is, byte by byte."""

import json

from serving.shape import without_nulls

ANSWER = {
    "choices": [
        {
            "message": {
                "content": 'it says "annotations":null, and ,"service_tier":null',
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
    message = ANSWER["choices"][0]["message"]  # type: ignore[index]  # a literal of mixed types
    assert answer == {
        "choices": [
            {
                "message": {"content": message["content"], "refusal": None, "annotations": []},
                "logprobs": None,
            }
        ],
        "usage": {"prompt_tokens": 1},
    }


def test_what_has_none_is_the_same() -> None:
    body = b'{"choices":[{"message":{"annotations":[{}]}}],"service_tier":"auto"}'
    assert without_nulls(body) == body
