"""Whole answers: their usage, and the shape that OpenAI's own have."""

import re

OBJECT = re.compile(rb"\s*:\s*\{")
PROMPT = re.compile(rb'"prompt_tokens"\s*:\s*(\d{1,12})')
ANSWER = re.compile(rb'"completion_tokens"\s*:\s*(\d{1,12})')

# vLLM writes null where OpenAI's schema has no null: the field is left out there, or is empty. In
# JSON text, quotes inside a string are escaped, so none of these can be part of an answer's text.
NULLS = (
    (b'"annotations":null', b'"annotations":[]'),
    (b',"function_call":null', b""),
    (b',"tool_calls":null', b""),
    (b',"service_tier":null', b""),
    (b',"prompt_tokens_details":null', b""),
    (b',"completion_tokens_details":null', b""),
)


def without_nulls(body: bytes) -> bytes:
    """Return an answer of vLLM without the nulls that OpenAI's schema does not know."""
    for null, instead in NULLS:
        body = body.replace(null, instead)
    return body


def usage_of(body: bytes) -> tuple[int, int] | None:
    """Return the tokens of prompt and answer by an answer's last `usage`; None if it has none.

    A token may be called "usage", too, as a value or as a name in `top_logprobs`; that has no
    object.
    """
    at = body.rfind(b'"usage"')
    while at >= 0 and not OBJECT.match(body, at + len(b'"usage"')):
        at = body.rfind(b'"usage"', 0, at)
    if at < 0 or not (prompt := PROMPT.search(body, at)):
        return None
    answer = ANSWER.search(body, at)
    return int(prompt[1]), int(answer[1]) if answer else 0
