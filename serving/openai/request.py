"""What the gateway has to know of a request's body; the body itself goes on as it came."""

import json
from dataclasses import dataclass
from typing import Any

from serving.config import Limits
from serving.openai.errors import ApiError, json_type, wrong_type

MAX_TOKENS = 2**31 - 1
"""A number of tokens above this is taken for it: no server writes as many, and a float has room."""

BYTES_PER_TOKEN = 4
"""The guess for text whose tokenizer the gateway does not have; settled by the answer's usage."""


@dataclass(slots=True)
class ModelRequest:
    """A body of /v1/completions, /v1/chat/completions or /v1/embeddings."""

    model: str
    stream: bool
    prefix: bytes
    """The beginning of the prompt, by which a replica is chosen."""
    prompt_tokens: int
    """A guess, unless the prompt is token ids."""
    tokens: int
    """The most tokens that prompt and answer can take."""
    body: bytes
    """What is sent to a model server."""
    hide_usage: bool
    """Whether the stream's usage, which the gateway needs, is not for the client."""


def read_request(raw: bytes, limits: Limits, prefix_chars: int) -> ModelRequest:
    """Return what a body says.

    Raises:
        ApiError: 400, as OpenAI's: no JSON, no model, or a prompt above the limit.
    """
    fields = parse(raw)
    model = model_name(fields, "model")
    field = next((name for name in ("messages", "prompt", "input") if name in fields), "prompt")
    text, ids = prompt_of(fields.get(field))
    check_prompt_length(field, len(text) + len(ids), limits.max_prompt_chars)
    start = text[:prefix_chars] if text else json.dumps(ids[:prefix_chars])
    prompt_tokens = len(ids) + -(-len(text.encode(errors="replace")) // BYTES_PER_TOKEN)
    stream = fields.get("stream") is True
    tokens, body = prompt_tokens, raw
    if field != "input":
        tokens += answer_tokens(fields, limits)
        if stream:
            body = with_usage(fields, raw)
    return ModelRequest(
        model,
        stream,
        start.encode(errors="replace"),
        prompt_tokens,
        tokens,
        body,
        hide_usage=body is not raw,
    )


def model_name(fields: dict[str, Any], field: str) -> str:
    """Return the name in a field that must have one."""
    name = fields.get(field)
    if name is None or name == "":
        param = None if field == "model" else field
        raise ApiError(400, f"you must provide a {field} parameter", param=param)
    if not isinstance(name, str):
        raise wrong_type(field, "a string", name)
    return name


def check_prompt_length(field: str, length: int, limit: int | None) -> None:
    """Refuse a prompt of more characters, or token ids, than the configuration allows."""
    if limit is not None and length > limit:
        message = (
            f"Invalid '{field}': string too long. Expected a string with maximum length {limit}, "
            f"but got a string with length {length} instead."
        )
        raise ApiError(400, message, code="string_above_max_length", param=field)


def answer_tokens(fields: dict[str, Any], limits: Limits) -> int:
    """Return the most tokens that all answers to a request can have."""
    each = count(fields.get("max_completion_tokens")) or count(fields.get("max_tokens"))
    if not each:
        each = limits.default_max_tokens if "messages" in fields else 16  # vLLM's for completions
    prompts = prompts_in(fields["prompt"]) if "prompt" in fields else 1
    return each * (count(fields.get("n")) or 1) * prompts


def with_usage(fields: dict[str, Any], raw: bytes) -> bytes:
    """Return the body of a stream that ends with its usage, to settle by; `raw` if it does so."""
    options = fields.get("stream_options")
    if "stream_options" not in fields:
        # Spliced in, so that everything else stays as the client wrote it.
        return raw[: raw.rindex(b"}")] + b',"stream_options":{"include_usage":true}}'
    if options is None or (isinstance(options, dict) and not options.get("include_usage")):
        asked = {**(options or {}), "include_usage": True}
        return json.dumps({**fields, "stream_options": asked}).encode()
    return raw


def parse(raw: bytes) -> dict[str, Any]:
    """Return a body's JSON object.

    Raises:
        ApiError: 400; it is none.
    """
    try:
        fields = json.loads(raw.decode())
    except (ValueError, RecursionError):
        message = (
            "We could not parse the JSON body of your request. (HINT: This likely means you aren't "
            "using your HTTP library correctly. The API expects a JSON payload, but what was sent "
            "was not valid JSON.)"
        )
        raise ApiError(400, message) from None
    if not isinstance(fields, dict):
        message = f"Invalid body: expected an object, but got {json_type(fields)} instead."
        raise ApiError(400, message, code="invalid_type")
    return fields


def prompt_of(value: Any) -> tuple[str, list[int]]:
    """Return all text and all token ids of a prompt, messages or input, whatever else is in it."""
    if isinstance(value, str):
        return value, []
    texts: list[str] = []
    ids: list[int] = []
    rest = [value]
    while rest:
        part = rest.pop()
        if isinstance(part, str):
            texts.append(part)
        elif isinstance(part, dict):
            rest += [part[n] for n in ("text", "content", "role") if n in part]
        elif isinstance(part, list):
            if part and type(part[0]) is int and all(type(i) is int for i in part):
                ids += part
            else:
                rest += reversed(part)
    return "\n".join(texts), ids


def prompts_in(value: Any) -> int:
    """Return how many prompts a completion has: several are a list of texts, or of lists of ids."""
    several = isinstance(value, list) and len(value) > 1 and type(value[0]) is not int
    return len(value) if several else 1


def only_text(messages: Any) -> bool:
    """Return whether messages have neither images nor sound, for which ids alone do not stand."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return False
    parts = [p for m in messages if isinstance(m.get("content"), list) for p in m["content"]]
    return all(
        isinstance(p, str) or (isinstance(p, dict) and p.get("type") == "text") for p in parts
    )


def count(value: Any) -> int:
    """Return a field that should be a number above 0, else 0: the model server refuses it then."""
    return min(value, MAX_TOKENS) if type(value) is int and value > 0 else 0
