"""What the gateway has to know of a request's body; the body itself goes on as it came."""

import json
from typing import Any

from serving.config import Limits
from serving.openai.errors import ApiError

MOST_TOKENS = 2**31 - 1
"""A number of tokens above this is taken for it: no server writes as many, and a float has room."""

BYTES_PER_TOKEN = 4
"""The guess for text whose tokenizer the gateway does not have; settled by the answer's usage."""


class Request:
    """A parsed body of /v1/completions, /v1/chat/completions or /v1/embeddings."""

    __slots__ = ("body", "hide_usage", "model", "prefix", "prompt_tokens", "stream", "tokens")

    def __init__(self, raw: bytes, limits: Limits, prefix_chars: int) -> None:
        """Read a body.

        Raises:
            ApiError: 400, as OpenAI's: no JSON, no model, or a prompt above the limit.
        """
        fields = parse(raw)
        model = fields.get("model")
        if model is None or model == "":
            raise ApiError(400, "you must provide a model parameter")
        if not isinstance(model, str):
            message = f"Invalid type for 'model': expected a string, but got {json_type(model)}."
            raise ApiError(400, message, code="invalid_type", param="model")
        self.model = model
        self.stream = fields.get("stream") is True
        where = next((n for n in ("messages", "prompt", "input") if n in fields), "prompt")
        text, ids = prompt_of(fields.get(where))
        length = len(text) + len(ids)
        if limits.max_prompt_chars is not None and length > limits.max_prompt_chars:
            message = (
                f"Invalid '{where}': string too long. Expected a string with maximum length "
                f"{limits.max_prompt_chars}, but got a string with length {length} instead."
            )
            raise ApiError(400, message, code="string_above_max_length", param=where)
        start = text[:prefix_chars] if text else json.dumps(ids[:prefix_chars])
        self.prefix = start.encode(errors="replace")
        self.prompt_tokens = len(ids) + -(-len(text.encode(errors="replace")) // BYTES_PER_TOKEN)
        self.tokens = self.prompt_tokens
        if where != "input":
            answer = count(fields.get("max_completion_tokens")) or count(fields.get("max_tokens"))
            default = 16 if where == "prompt" else limits.default_max_tokens
            answers = prompts_in(fields["prompt"]) if "prompt" in fields else 1
            self.tokens += (answer or default) * (count(fields.get("n")) or 1) * answers
        self.body, self.hide_usage = raw, False
        if self.stream and where != "input":
            self._ask_for_usage(fields)

    def _ask_for_usage(self, fields: dict[str, Any]) -> None:
        """Have the stream end with its usage, to settle by; hidden from who did not ask for it."""
        options = fields.get("stream_options")
        if options is None and "stream_options" not in fields:
            # Spliced in, so that everything else stays as the client wrote it.
            end = self.body.rindex(b"}")
            self.body = self.body[:end] + b',"stream_options":{"include_usage":true}}'
            self.hide_usage = True
        elif options is None or (isinstance(options, dict) and not options.get("include_usage")):
            asked = {**(options or {}), "include_usage": True}
            self.body = json.dumps({**fields, "stream_options": asked}).encode()
            self.hide_usage = True


def parse(raw: bytes) -> dict[str, Any]:
    """The body's JSON object."""
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
    """All text and all token ids of a prompt, messages or input, whatever else is in it."""
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
    """How many prompts a completion has: a list of texts, or of lists of ids, has several."""
    several = isinstance(value, list) and len(value) > 1 and type(value[0]) is not int
    return len(value) if several else 1


def only_text(messages: Any) -> bool:
    """Whether messages have neither images nor sound, for which ids alone do not stand."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return False
    parts = [p for m in messages if isinstance(m.get("content"), list) for p in m["content"]]
    return all(
        isinstance(p, str) or (isinstance(p, dict) and p.get("type") == "text") for p in parts
    )


def count(value: Any) -> int:
    """A field that should be a number above 0; 0 if it is not (the upstream says so then)."""
    return min(value, MOST_TOKENS) if type(value) is int and value > 0 else 0


def json_type(value: Any) -> str:
    """What OpenAI calls a JSON value in its messages."""
    names = {bool: "a boolean", int: "an integer", float: "a decimal", str: "a string"}
    names |= {list: "an array", dict: "an object"}
    return names.get(type(value), "null")
