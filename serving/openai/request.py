"""What the gateway has to know of a request's body; the body itself goes on as it came.

A body is read as vLLM reads it: by the same parser, and by the types of vLLM's own request models,
of which the fields that matter here are repeated. So "300" is 300 where vLLM takes it for that, and
what vLLM would refuse is refused. All other fields are left to vLLM.
"""

import json
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from serving.config import Limits
from serving.openai.bodies import BODIES, Body, EmbeddingBody, GeneratingBody, missing, tokens_in
from serving.openai.errors import ApiError, json_type, wrong_type

MAX_PARTS = 200_000
"""Most characters in a body that could begin an array, an object or a field's value: parsed, each
of these takes up to a hundred times its bytes."""

_compact = json.JSONEncoder(separators=(",", ":")).encode


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
    stream_interval: int
    """How many tokens an event of the stream may have."""
    padded_prompts: int = 0
    """How many prompts are made as long as the model's context."""

    def pad(self, context: int) -> None:
        """Have the padded prompts be as long as a context of so many tokens; an embedding has no
        other tokens."""
        self.prompt_tokens = max(self.prompt_tokens, self.padded_prompts * context)
        self.tokens = max(self.tokens, self.prompt_tokens)

    def tokens_of(self, events: int) -> int:
        """Return the most tokens of so many events, of a stream that ends without its usage."""
        answer = self.tokens - self.prompt_tokens
        return max(events, min(events * self.stream_interval, answer))


def read_request(
    raw: bytes, route: str, limits: Limits, prefix_chars: int, limit_answer: bool = False
) -> ModelRequest:
    """Return what a body says.

    With `limit_answer`, an answer for which it sets no limit gets `limits.default_max_tokens`.

    Raises:
        ApiError: 400, as OpenAI's: no JSON, no model, a field of a wrong type, or a prompt above
            the limit.
    """
    fields = parse(raw)
    model = model_name(fields, "model")
    body = validated(BODIES[route], fields)
    try:
        found = body.prompts(fields)
    except RecursionError:
        raise no_json() from None
    text = "\n".join(found.texts)
    known = len(found.ids) + found.other_tokens
    check_prompt_length(body.prompt_field, len(text) + known, limits.max_prompt_chars)
    start = text[:prefix_chars] if text else json.dumps(found.ids[:prefix_chars])
    prompt_tokens = known + tokens_in(text)
    added: dict[str, Any] = {}
    stream = hide_usage = False
    interval = 1
    if isinstance(body, GeneratingBody):
        stream, interval = bool(body.stream), body.stream_interval or 1
        asked = body.stream_options
        if fields.get("stream_options") and not fields.get("stream"):  # vLLM asks this of both raw
            message = "The 'stream_options' parameter is only allowed when 'stream' is enabled."
            raise ApiError(400, message, param="stream_options")
        if stream and not (asked and asked.include_usage):
            hide_usage = True
            added["stream_options"] = {"include_usage": True}
            if asked:  # without include_usage, vLLM does not look at the other
                others = {**fields["stream_options"], "continuous_usage_stats": False}
                added["stream_options"] = others | added["stream_options"]
        if limit_answer and body.limit is None:
            added["max_completion_tokens"] = limits.default_max_tokens
    return ModelRequest(
        model,
        stream,
        start.encode(errors="replace"),
        prompt_tokens,
        prompt_tokens + body.answer_tokens(limits.default_max_tokens) * found.count,
        with_fields(raw, fields, added) if added else raw,
        hide_usage,
        interval,
        found.count if isinstance(body, EmbeddingBody) and body.padding == "max_length" else 0,
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


def validated(kind: type[Body], fields: dict[str, Any]) -> Body:
    """Return a body's fields that matter.

    Raises:
        ApiError: 400, with the first that is missing or has a wrong type.
    """
    try:
        return kind.model_validate(fields)
    except ValidationError as error:
        first = error.errors(include_url=False, include_context=False)[0]
        name = str(first["loc"][0])
        if first["type"] == "missing":
            raise missing(name) from None
        if expected := kind.model_fields[name].description:
            raise wrong_type(name, expected, fields[name]) from None
        message = f"Invalid value for '{name}': {first['msg']}."
        raise ApiError(400, message, code="invalid_value", param=name) from None


def check_prompt_length(field: str, length: int, limit: int | None) -> None:
    """Refuse a prompt of more characters, or token ids, than the configuration allows."""
    if limit is not None and length > limit:
        message = (
            f"Invalid '{field}': string too long. Expected a string with maximum length {limit}, "
            f"but got a string with length {length} instead."
        )
        raise ApiError(400, message, code="string_above_max_length", param=field)


def with_fields(raw: bytes, fields: dict[str, Any], added: dict[str, Any]) -> bytes:
    """Return a body, whose fields are `fields`, with others, and else as the client wrote it."""
    if added.keys().isdisjoint(fields) and b"\0" not in raw[:4]:  # not UTF-16 or UTF-32
        return b"%b,%b" % (raw[: raw.rindex(b"}")], _compact(added)[1:].encode())
    return to_json(fields | added)


def to_json(fields: dict[str, Any]) -> bytes:
    """Return a body with a client's fields.

    Raises:
        ApiError: 400; they are nested so deeply that they could only just be parsed.
    """
    try:
        return json.dumps(fields).encode()
    except RecursionError:
        raise no_json() from None


def parse(raw: bytes) -> dict[str, Any]:
    """Return a body's JSON object.

    Raises:
        ApiError: 400; it is none.
    """
    if len(raw) > MAX_PARTS and sum(map(raw.count, (b"[", b"{", b":"))) > MAX_PARTS:
        message = f"The body has more than {MAX_PARTS} arrays, objects and fields."
        raise ApiError(400, message, code="body_too_complex")
    try:
        fields = json.loads(raw)  # as Starlette does: a BOM, UTF-16, NaN and half surrogates are in
    except (ValueError, RecursionError):
        raise no_json() from None
    if not isinstance(fields, dict):
        message = f"Invalid body: expected an object, but got {json_type(fields)} instead."
        raise ApiError(400, message, code="invalid_type")
    return fields


def no_json() -> ApiError:
    """Return OpenAI's 400 for a body that cannot be parsed."""
    message = (
        "We could not parse the JSON body of your request. (HINT: This likely means you aren't "
        "using your HTTP library correctly. The API expects a JSON payload, but what was sent "
        "was not valid JSON.)"
    )
    return ApiError(400, message)


def only_text(messages: Any) -> bool:
    """Return whether messages have neither images nor sound, for which ids alone do not stand."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return False
    parts = [p for m in messages if isinstance(m.get("content"), list) for p in m["content"]]
    return all(
        isinstance(p, str) or (isinstance(p, dict) and p.get("type") == "text") for p in parts
    )
