"""The bodies of the routes: the fields that matter to the gateway, with vLLM's own types."""

import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, InstanceOf, ValidationError, WrapValidator

from serving.openai.errors import ApiError, wrong_type

MAX_TOKENS = 2**31 - 1
"""A number of tokens above this is taken for it: no server writes as many, and a float has room."""

BYTES_PER_TOKEN = 4
"""The guess for text whose tokenizer the gateway does not have; settled by the answer's usage."""

MEDIA_TOKENS = 1024
"""The guess for an image, a sound or a video, whose data is no text; settled in the same way."""

EMBEDS_BYTES_PER_TOKEN = 1024
"""The guess for tokens that come as a tensor in base64: few models have under 384 dimensions."""

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

_as_text = json.JSONEncoder(ensure_ascii=False).encode


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

    model_config = ConfigDict(extra="allow")  # as in vLLM: half surrogates are no names

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
    padding: Literal["max_length", "do_not_pad"] | None = None

    def prompts(self, fields: dict[str, Any]) -> Prompts:
        """Return both, whichever of them vLLM takes; no messages are a conversation, too."""
        if self.input is None and self.messages is None:
            if fields.get("input") is None:
                raise missing("input")
            kinds = "a string, or an array of strings, of token ids or of arrays of token ids"
            raise wrong_type("input", kinds, fields["input"])
        found = Prompts()
        found.add(self.input)
        if self.messages is not None:
            inputs, found.count = found.count, 0
            found.add(self.messages)
            found.add_for_template(fields)
            found.count = max(inputs, found.count, 1)
        return found


BODIES: dict[str, type[Body]] = {
    "/v1/completions": CompletionBody,
    "/v1/chat/completions": ChatBody,
    "/v1/embeddings": EmbeddingBody,
}
"""By route."""


def missing(name: str) -> ApiError:
    """Return OpenAI's 400 for a field that must be there."""
    message = f"Missing required parameter: '{name}'."
    return ApiError(400, message, code="missing_required_parameter", param=name)


def tokens_in(text: str) -> int:
    """Return a guess of how many tokens a text has."""
    return -(-len(text.encode(errors="replace")) // BYTES_PER_TOKEN)


def at_least_1(number: int) -> int:
    """Return a number that should be above 0, within what can be counted."""
    return min(max(number, 1), MAX_TOKENS)
