"""What a request to /v1/compare asks for."""

from typing import Any

from serving.config import EVERY, Config
from serving.openai.bodies import at_least_1
from serving.openai.errors import ApiError, wrong_type
from serving.openai.request import model_name, only_text, parse, read_request, to_json

MAX_MODELS = 32

OWN = frozenset({"reference", "models", "top_k", "generate", "prompt", "messages", "max_tokens"})

FOR_MESSAGES = (
    "add_generation_prompt", "chat_template", "chat_template_kwargs", "continue_final_message",
    "tools",
)  # fmt: skip
"""Fields that go to the reference's chat template."""

REFUSED = (
    "model", "stream", "stream_options", "n", "best_of", "echo", "suffix", "logprobs",
    "prompt_logprobs", "use_beam_search", "return_token_ids", "prompt_embeds",
)  # fmt: skip
"""They would change what is compared, or how it is asked for."""


class ComparisonRequest:
    """A parsed body of /v1/compare.

    `prompt` is a list of token ids, or None: `to_tokenize` is what the reference has to be asked
    then. `sampling` is what every model that writes an answer gets, but for the prompt. `tokens` is
    the most that all requests to the models can use.
    """

    def __init__(self, raw: bytes, config: Config) -> None:
        """Read a body.

        Raises:
            ApiError: 400; no JSON, or a field that is missing, wrong or not allowed.
        """
        fields = parse(raw)
        for name in REFUSED:
            if fields.get(name) is not None:
                raise refused(f"'{name}' is not for /v1/compare.", name)
        self.limits = config.limits
        self.reference = model_name(fields, "reference")
        self.models = readers(fields, self.reference, config)
        self.top_k = whole_number(fields, "top_k", 10)
        self.max_tokens = whole_number(fields, "max_tokens", 16)
        generate = fields.get("generate", True)
        if not isinstance(generate, bool):
            raise wrong_type("generate", "a boolean", generate)
        self.generate = generate
        own = OWN | (set(FOR_MESSAGES) if "messages" in fields else set())
        self.sampling = {k: v for k, v in fields.items() if k not in own}
        self.sampling |= {"max_tokens": self.max_tokens, "add_special_tokens": False}
        self.prompt, self.to_tokenize = prompt(fields)
        asked = to_json({**self.to_tokenize, "model": self.reference})
        prefix_chars = config.routing.prefix_chars
        request = read_request(asked, route_of(self.to_tokenize), config.limits, prefix_chars)
        written = request.prompt_tokens + self.max_tokens
        # How many tokens a text has is not known yet.
        self.check_length(self.max_tokens if self.prompt is None else written)
        count = 1 + len(self.models)
        self.tokens = written * (count if generate else 1) + (written + 1) * count

    def check_length(self, tokens: int) -> None:
        """Refuse a comparison over so many tokens of prompt and answer if they are too many.

        Raises:
            ApiError: 400.
        """
        count = 1 + len(self.models)
        for field, what, most, could in (
            ("max_tokens", "Prompt and answer", self.limits.max_compare_tokens, tokens),
            ("models", f"All {count} models", self.limits.max_compare_total, tokens * count),
        ):
            if could > most:
                message = f"{what} may have {most} tokens together, but could have {could}."
                raise ApiError(400, message, code="compare_too_long", param=field)


def route_of(fields: dict[str, Any]) -> str:
    """Return the route whose request has these fields, be it /tokenize that they are sent to."""
    return "/v1/chat/completions" if "messages" in fields else "/v1/completions"


def readers(fields: dict[str, Any], reference: str, config: Config) -> list[str]:
    """Return the models that read."""
    found = fields.get("models")
    if found is None:
        found = [m.name for m in config.models if m.name not in (EVERY, reference)]
    if not isinstance(found, list) or not all(isinstance(m, str) and m for m in found):
        raise wrong_type("models", "an array of strings", found)
    if not found:
        raise refused("There is no model to compare with the reference.", "models")
    if len(set(found)) < len(found):
        raise refused("'models' has a model twice.", "models")
    if len(found) > MAX_MODELS:
        raise refused(f"'models' has more than {MAX_MODELS} models.", "models")
    return found


def prompt(fields: dict[str, Any]) -> tuple[list[int] | None, dict[str, Any]]:
    """Return token ids, or None; and the fields that say them or what they are made of."""
    given = [name for name in ("prompt", "messages") if fields.get(name) is not None]
    if len(given) != 1:
        raise refused("you must provide either prompt or messages", "prompt")
    value = fields[given[0]]
    if given == ["messages"]:
        if not isinstance(value, list) or not all(isinstance(m, dict) for m in value) or not value:
            raise wrong_type("messages", "an array of objects", value)
        if not only_text(value):
            raise refused("'messages' may have text only: models read token ids.", "messages")
        return None, {"messages": value, **{k: fields[k] for k in FOR_MESSAGES if k in fields}}
    if isinstance(value, str) and value:
        return None, {"prompt": value, "add_special_tokens": fields.get("add_special_tokens", True)}
    if isinstance(value, list) and value and all(type(i) is int and i >= 0 for i in value):
        return value, {"prompt": value}
    raise refused("'prompt' must be one text or one array of token ids, not empty.", "prompt")


def whole_number(fields: dict[str, Any], name: str, default: int) -> int:
    """Return a field that must be a whole number above 0."""
    value = fields.get(name)
    if value is None:
        return default
    if type(value) is not int:
        raise wrong_type(name, "an integer", value)
    if value < 1:
        raise refused(f"'{name}' must be at least 1, but is {value}.", name)
    return at_least_1(value)


def refused(message: str, name: str) -> ApiError:
    """Return the 400 for a field."""
    return ApiError(400, message, param=name)
