"""Whole answers in the shape that OpenAI's own have."""

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
    """An answer without the nulls that OpenAI's schema does not know; written as vLLM writes."""
    for null, instead in NULLS:
        body = body.replace(null, instead)
    return body
