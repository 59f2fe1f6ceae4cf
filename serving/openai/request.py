"""What the gateway has to know of a request's body; the body itself goes on as it came.

A body is read as vLLM reads it: by the same parser, and by the types of vLLM's own request models,
of which the fields that matter here are repeated. So "300" is 300 where vLLM takes it for that, and
what vLLM would refuse is refused. All other fields are left to vLLM.
"""

import asyncio
import json
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import BaseModel, Field, InstanceOf, ValidationError, WrapValidator

from serving.config import Limits
from serving.openai.errors import ApiError, json_type, wrong_type

MAX_TOKENS = 2**31 - 1
"""A number of tokens above this is taken for it: no server writes as many, and a float has room."""

BYTES_PER_TOKEN = 4
"""The guess for text whose tokenizer the gateway does not have; settled by the answer's usage."""

MEDIA_TOKENS = 1024
"""The guess for an image, a sound or a video, whose data is no text; settled in the same way."""

EMBEDS_BYTES_PER_TOKEN = 1024
"""The guess for tokens that come as a tensor in base64: few models have under 384 dimensions."""

LARGE_BODY = 256 * 1024
"""A larger body, in bytes, is read beside the event loop."""

MAX_PARTS = 200_000
"""Most characters in a body that could begin an array, an object or a field's value: parsed, each
of these takes up to a hundred times its bytes."""

MEDIA = frozenset((
    "image_url", "image_embeds", "image_pil", "input_audio", "audio_url", "audio_embeds",
    "video_url", "video_embeds",
))  # fmt: skip
"""Fields of a message's part that have data of another kind than text."""

FOR_TEMPLATE = (
    "tools", "tool_choice", "documents", "chat_template", "chat_template_kwargs", "response_format",
)  # fmt: skip
"""Fields beside the messages of which a chat template may make text."""

T = TypeVar("T")

Each = Annotated[list[T], Field(fail_fast=True)]
"""A list. Its first bad item is enough to refuse it: there may be a million."""

Message = InstanceOf[dict[str, Any]]
"""vLLM looks closer at what is in it."""

Conversation = Annotated[list[Message], Field(fail_fast=True, min_length=1)]

Id = Annotated[int, Field(ge=0)]

_reader = ThreadPoolExecutor(1, "large-bodies")
"""A single thread: a parser does not let go of Python, so the event loop waits for one at most."""

_compact = json.JSONEncoder(separators=(",", ":")).encode
_as_text = json.JSONEncoder(ensure_ascii=False).encode


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

    def tokens_of(self, events: int) -> int:
        """Return the most tokens of so many events, of a stream that ends without its usage."""
        answer = self.tokens - self.prompt_tokens
        return max(events, min(events * self.stream_interval, answer))


@dataclass(slots=True)
class Prompts:
    """All that a request gives a model to read."""

    texts: list[str] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    other_tokens: int = 0
    """A guess for what is neither."""
    count: int = 0
    """How many prompts there are: each has answers of its own."""

    def add(self, value: Any) -> None:
        """Add a prompt, or several: a text, token ids, messages, or a list of one of these."""
        if isinstance(value, list):
            one = value and isinstance(value[0], int | dict)
            for prompt in [value] if one else value:
                self.count += 1
                if isinstance(prompt, str):
                    self.texts.append(prompt)
                elif prompt and isinstance(prompt[0], dict):
                    self._add_messages(prompt)
                else:
                    self.ids += prompt
        elif value is not None:
            self.count += 1
            self.texts.append(value)

    def add_for_template(self, fields: dict[str, Any]) -> None:
        """Add the fields of which a chat template may make text."""
        for name in FOR_TEMPLATE:
            if (value := fields.get(name)) is not None:
                self.texts.append(_as_text(value))

    def add_tensors(self, tensors: Iterable[bytes | str]) -> None:
        """Add tensors that stand for tokens, in base64."""
        self.other_tokens += sum(1 + len(t) // EMBEDS_BYTES_PER_TOKEN for t in tensors)

    def _add_messages(self, messages: list[dict[str, Any]]) -> None:
        """Add every text in messages: their roles, calls of tools, reasoning and all else, too."""
        for message in messages:
            for name, value in message.items():
                if isinstance(value, str):
                    self.texts.append(value)
                elif name == "content" and isinstance(value, list):
                    for part in value:
                        self._add_part(part)
                elif value is not None:
                    self.texts.append(_as_text(value))

    def _add_part(self, part: Any) -> None:
        if not isinstance(part, dict):
            part = {"text": part}
        for name, value in part.items():
            if name in MEDIA:
                self.other_tokens += MEDIA_TOKENS
            elif name == "data" and isinstance(value, str):
                self.add_tensors([value])
            elif name != "type":
                self.texts.append(value if isinstance(value, str) else _as_text(value))


class Body(BaseModel):
    """A body's fields that matter, with vLLM's types; unknown ones are ignored."""

    prompt_field: ClassVar[str]
    """The name by which a prompt that is too long is refused."""

    def prompts(self, fields: dict[str, Any]) -> Prompts:
        """Return the prompts, where `fields` is the whole body."""
        raise NotImplementedError

    def answer_tokens(self, default: int) -> int:
        """Return the most tokens of all answers to one prompt; `default` is for one answer."""
        return 0


class StreamOptions(BaseModel):
    """What a stream has besides tokens."""

    include_usage: bool | None = False
    continuous_usage_stats: bool | None = False


class GeneratingBody(Body):
    """A body whose answer is written, and may be streamed."""

    stream: bool | None = False
    stream_options: StreamOptions | None = None
    stream_interval: Annotated[int, Field(ge=1)] | None = None
    max_tokens: int | None = None
    n: int | None = 1

    @property
    def limit(self) -> int | None:
        """The most tokens of one answer; None: as many as the model can."""
        return self.max_tokens

    def answer_tokens(self, default: int) -> int:
        """Return the most tokens of all answers to one prompt; those of a beam search are `n`."""
        # With `echo`, vLLM makes 1 of a limit of 0; it refuses all else that is below 1.
        limit = default if self.limit is None else self.limit
        return at_least_1(limit) * at_least_1(1 if self.n is None else self.n)


class CompletionBody(GeneratingBody):
    """A body of /v1/completions."""

    prompt_field = "prompt"

    prompt: Each[Id] | Each[Each[Id]] | str | Each[str] | None = Field(
        None, description="a string, or an array of strings, of token ids or of arrays of token ids"
    )
    prompt_embeds: bytes | Each[bytes] | None = Field(
        None, description="a string or an array of strings"
    )
    suffix: str | None = None
    n: int = 1

    @property
    def limit(self) -> int:
        """The most tokens of one answer."""
        return 16 if self.max_tokens is None else self.max_tokens  # vLLM's

    def prompts(self, fields: dict[str, Any]) -> Prompts:
        """Return texts, token ids and tensors, all of which are completed."""
        if self.prompt in (None, "") and self.prompt_embeds in (None, []):
            raise missing("prompt")
        found = Prompts()
        found.add(self.prompt)
        if self.suffix:
            found.other_tokens += tokens_in(self.suffix) * found.count
        if self.prompt_embeds is not None:
            given = self.prompt_embeds
            tensors = [given] if isinstance(given, bytes) else given
            found.add_tensors(tensors)
            found.count += len(tensors)
        return found


class ChatBody(GeneratingBody):
    """A body of /v1/chat/completions."""

    prompt_field = "messages"

    messages: Each[Message] = Field(description="an array of objects")
    max_completion_tokens: int | None = None

    @property
    def limit(self) -> int | None:
        """The most tokens of one answer; None: as many as the model can."""
        newer = self.max_completion_tokens
        return self.max_tokens if newer is None else newer

    def prompts(self, fields: dict[str, Any]) -> Prompts:
        """Return the one conversation."""
        found = Prompts()
        found.add(self.messages)
        found.count = 1
        found.add_for_template(fields)
        transfer = fields.get("kv_transfer_params")
        ids = transfer.get("prompt_token_ids") if isinstance(transfer, dict) else None
        if isinstance(ids, list):  # vLLM takes them in the place of the messages
            found.other_tokens += len(ids)
        return found


def or_none(value: Any, validate: Callable[[Any], Any]) -> Any:
    """Return a valid value, and None for any other."""
    try:
        return validate(value)
    except ValidationError:
        return None


class EmbeddingBody(Body):
    """A body of /v1/embeddings: one of its two fields is enough, and then the other may be bad."""

    prompt_field = "input"

    input: Annotated[
        Each[int] | Each[Each[int]] | str | Each[str] | Each[Message] | Each[Conversation] | None,
        WrapValidator(or_none),
    ] = None
    messages: Annotated[Each[Message] | Each[Conversation] | None, WrapValidator(or_none)] = None

    def prompts(self, fields: dict[str, Any]) -> Prompts:
        """Return both, whichever of them vLLM takes."""
        if self.input is None and self.messages is None:
            if fields.get("input") is None:
                raise missing("input")
            kinds = "a string, or an array of strings, of token ids or of arrays of token ids"
            raise wrong_type("input", kinds, fields["input"])
        found = Prompts()
        found.add(self.input)
        if self.messages is not None:
            found.add(self.messages)
            found.add_for_template(fields)
        return found


BODIES: dict[str, type[Body]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/embeddings": EmbeddingBody,
}
"""By route."""


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
    )


async def beside_the_loop(read: Callable[..., T], raw: bytes, *rest: Any) -> T:
    """Return `read(raw, *rest)`; streams go on meanwhile if the body is large."""
    if len(raw) <= LARGE_BODY:
        return read(raw, *rest)
    found: list[T] = []
    refused: list[ApiError] = []

    def run() -> None:
        try:
            found.append(read(raw, *rest))
        except ApiError as error:
            refused.append(error)

    # Not by the future's own result: it is part of a cycle, in which bodies would pile up.
    await asyncio.get_running_loop().run_in_executor(_reader, run)
    if refused:
        raise refused.pop()
    return found.pop()


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


def missing(name: str) -> ApiError:
    """Return OpenAI's 400 for a field that must be there."""
    message = f"Missing required parameter: '{name}'."
    return ApiError(400, message, code="missing_required_parameter", param=name)


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


def tokens_in(text: str) -> int:
    """Return a guess of how many tokens a text has."""
    return -(-len(text.encode(errors="replace")) // BYTES_PER_TOKEN)


def at_least_1(number: int) -> int:
    """Return a number that should be above 0, within what can be counted."""
    return min(max(number, 1), MAX_TOKENS)


def only_text(messages: Any) -> bool:
    """Return whether messages have neither images nor sound, for which ids alone do not stand."""
    if not isinstance(messages, list) or not all(isinstance(m, dict) for m in messages):
        return False
    parts = [p for m in messages if isinstance(m.get("content"), list) for p in m["content"]]
    return all(
        isinstance(p, str) or (isinstance(p, dict) and p.get("type") == "text") for p in parts
    )
