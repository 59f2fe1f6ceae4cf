"""The gateway reads a request as vLLM's own classes do, whatever is in it."""

import json
import os
from typing import Any

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError

from serving.config import Limits
from serving.openai.errors import ApiError
from serving.openai.request import ModelRequest, read_request

pytestmark = [
    pytest.mark.integration,  # vLLM's modules take 10 seconds to import
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),  # max_tokens, in a chat
]

READINGS = settings(
    max_examples=int(os.environ.get("REQUEST_EXAMPLES", "300")),  # bodies that a test reads
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)

MAX_MODEL_LEN = 1 << 40
"""Of a model that never is what ends an answer."""

DEFAULTS: dict[str, Any] = {}
"""vLLM's default sampling parameters of a model whose generation_config.json sets none."""


def refused() -> tuple[type[Exception], ...]:
    """Return the errors for which vLLM answers 400."""
    from vllm.exceptions import VLLMValidationError

    return (VLLMValidationError, ValidationError, ValueError, TypeError, OverflowError)


def mostly(good: st.SearchStrategy[Any], other: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Return a strategy that seldom draws the other: a body is refused for one bad field."""
    return st.integers(0, 15).flatmap(lambda i: other if i == 0 else good)


TEXTS = st.text(max_size=4) | st.sampled_from(["", "\ud800", "1", "é" * 9, "x" * 40])
# Whatever could pass for one of vLLM's numbers and switches, and what just does not.
NUMBERS = mostly(
    st.integers(1, 9)
    | st.sampled_from(["3", " 7 ", "+5", "4.0", "٣", "1_000", 1.0, 4.0, 1e3, True, None, 2**31, 0]),
    st.integers()
    | st.floats()
    | st.booleans()
    | st.sampled_from([-1, 2.5, 1e400, 2**63, 10**30, "-1", "4.5", "1e2", "0x9", "", "many"]),
)
SWITCHES = mostly(
    st.booleans()
    | st.sampled_from([0, 1, 0.0, 1.0, "true", "TRUE", "False", "t", "yes", "off", None]),
    st.sampled_from([2, 0.5, "", " on", "x"]),
)
ANYTHING = st.recursive(
    NUMBERS | SWITCHES | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
IDS = st.lists(st.integers(0, 9) | st.sampled_from(["3", 1.0, True]), max_size=4)
PROMPTS = mostly(
    TEXTS | IDS | st.lists(IDS, max_size=4) | st.lists(TEXTS, max_size=4),
    st.lists(IDS | TEXTS | NUMBERS, max_size=3) | ANYTHING,
)
PARTS = mostly(
    st.fixed_dictionaries({"type": st.just("text"), "text": TEXTS})
    | st.fixed_dictionaries(
        {"type": st.just("image_url"), "image_url": st.fixed_dictionaries({"url": TEXTS})}
    )
    | TEXTS,
    ANYTHING,
)
MESSAGES = st.lists(
    mostly(
        st.fixed_dictionaries(
            {
                "role": mostly(st.sampled_from(["user", "assistant", "tool", "u"]), ANYTHING),
                "content": mostly(TEXTS | st.lists(PARTS, max_size=2), ANYTHING),
            },
            optional={
                "reasoning": mostly(TEXTS, ANYTHING),
                "tool_calls": mostly(st.just([]), st.lists(ANYTHING, max_size=2) | ANYTHING),
                "name": mostly(TEXTS, ANYTHING),
            },
        ),
        ANYTHING,
    ),
    max_size=3,
)
OPTIONS = st.dictionaries(
    st.sampled_from(["include_usage", "continuous_usage_stats", "x"]), SWITCHES, max_size=3
)
READ: dict[str, st.SearchStrategy[Any]] = {
    "prompt": PROMPTS,
    "prompt_embeds": mostly(TEXTS | st.lists(TEXTS, max_size=3), ANYTHING),
    "messages": mostly(MESSAGES, st.lists(MESSAGES, max_size=2) | ANYTHING),
    "input": mostly(PROMPTS | MESSAGES, st.lists(MESSAGES, max_size=2)),
    "max_tokens": NUMBERS,
    "max_completion_tokens": NUMBERS,
    "n": NUMBERS,
    "stream": mostly(SWITCHES, ANYTHING),
    "stream_options": mostly(OPTIONS | st.none(), ANYTHING),
    "stream_interval": NUMBERS,
    "suffix": mostly(TEXTS, ANYTHING),
    "padding": mostly(st.sampled_from(["max_length", "do_not_pad", None]), ANYTHING),
}
"""Fields that the gateway reads."""
UNREAD: dict[str, st.SearchStrategy[Any]] = {
    "echo": SWITCHES,
    "use_beam_search": SWITCHES,
    "best_of": NUMBERS,
    "min_tokens": NUMBERS,
    "ignore_eos": SWITCHES,
    "truncate_prompt_tokens": NUMBERS,
    "temperature": mostly(st.sampled_from([0, 1, "0.5"]), NUMBERS),
    "logprobs": mostly(SWITCHES, NUMBERS),
    "tools": st.lists(ANYTHING, max_size=2) | st.none(),
    "kv_transfer_params": mostly(st.dictionaries(st.just("prompt_token_ids"), IDS), ANYTHING),
    "chat_template_kwargs": mostly(st.dictionaries(TEXTS, ANYTHING, max_size=2), ANYTHING),
    "stop": mostly(TEXTS, ANYTHING),
}
"""Fields that are left to vLLM."""
MAIN = {
    "/v1/completions": ["prompt"],
    "/v1/chat/completions": ["messages"],
    "/v1/embeddings": ["input", "messages"],
}
"""Fields of a prompt, of which each body has one."""
ENCODINGS = st.sampled_from(["utf-8"] * 6 + ["utf-8-sig", "utf-16", "utf-16-le", "utf-32-be"])


@st.composite
def bodies(draw: st.DrawFn, route: str, others: bool) -> bytes:
    """Draw a body for a route, and whether it may have fields that the gateway leaves to vLLM.

    Objects may have a field twice, as JSON can and a Python dict cannot.
    """
    strategies = {**READ, **(UNREAD if others else {})}
    pairs = draw(
        st.lists(
            st.sampled_from(sorted(strategies)).flatmap(
                lambda name: st.tuples(st.just(name), strategies[name])
            ),
            max_size=6,
        )
    )
    name = draw(st.sampled_from(MAIN[route]))
    pairs.insert(draw(st.integers(0, len(pairs))), (name, draw(READ[name])))
    pairs.insert(0, ("model", "m"))
    ascii_only = draw(st.booleans())
    text = ", ".join(
        f"{json.dumps(name)}: {json.dumps(value, ensure_ascii=ascii_only)}" for name, value in pairs
    )
    return f"{{{text}}}".encode(draw(ENCODINGS), "surrogatepass")


@pytest.fixture(scope="module")
def classes() -> dict[str, TypeAdapter[Any]]:
    """Return vLLM's own request model of each route."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.entrypoints.pooling.embed.protocol import EmbeddingRequest

    kinds = (CompletionRequest, ChatCompletionRequest, EmbeddingRequest)
    return {route: TypeAdapter(kind) for route, kind in zip(MAIN, kinds, strict=True)}


def by_gateway(raw: bytes, route: str) -> ModelRequest | None:
    """Return what the gateway reads for a key with a budget; None if it refuses the body."""
    try:
        return read_request(raw, route, Limits(), 8, True)
    except ApiError as error:
        assert error.status == 400
        return None


def by_vllm(raw: bytes, adapter: TypeAdapter[Any]) -> Any:
    """Return vLLM's request; None if it refuses the body, which starlette parses like this."""
    try:
        return adapter.validate_python(json.loads(raw))
    except refused():
        return None


def is_chat(request: Any) -> bool:
    """Return whether it is a chat; vLLM's models also have whatever else is in a body."""
    return "messages" in type(request).model_fields


def prompts_of(request: Any) -> int:
    """Return how many prompts vLLM completes: OnlineRenderer.preprocess_completion."""
    from vllm.renderers.inputs.preprocess import prompt_to_seq

    if is_chat(request):
        return 1
    given = (request.prompt_embeds, request.prompt)
    return sum(len(prompt_to_seq(prompts)) for prompts in given if prompts is not None)


def inputs_of(request: Any) -> int:
    """Return how many inputs, or conversations, vLLM makes embeddings of."""
    from vllm.entrypoints.pooling.embed.protocol import (
        EmbeddingBatchChatRequest,
        EmbeddingChatRequest,
    )
    from vllm.renderers.inputs.preprocess import prompt_to_seq

    if isinstance(request, EmbeddingChatRequest):
        return 1
    batched = isinstance(request, EmbeddingBatchChatRequest)
    return len(request.messages if batched else prompt_to_seq(request.input))


def most_tokens(request: Any) -> int:
    """Return the most tokens that vLLM writes: OpenAIServingCompletion and OpenAIServingChat.

    0 if it refuses to, which it may do only now.
    """
    from vllm.entrypoints.serve.utils.api_utils import get_max_tokens

    limit = request.max_tokens
    if is_chat(request) and request.max_completion_tokens is not None:
        limit = request.max_completion_tokens
    try:
        each = get_max_tokens(MAX_MODEL_LEN, limit, 0, DEFAULTS)
        if request.use_beam_search:
            beams = request.to_beam_search_params(each, DEFAULTS)
            return max(0, beams.max_tokens) * beams.beam_width * prompts_of(request)
        sampling = request.to_sampling_params(each, DEFAULTS)
    except refused():
        return 0
    return sampling.max_tokens * sampling.n * prompts_of(request)


def usage_flags(request: Any) -> tuple[bool, bool]:
    """Return whether vLLM's stream ends with its usage, and whether each event has it."""
    from vllm.entrypoints.serve.utils.api_utils import should_include_usage

    return should_include_usage(request.stream_options, False)


def has_messages(raw: bytes) -> bool:
    """Return whether there is an object that could be a message."""
    fields = json.loads(raw)
    lists = [found for name in ("messages", "input") if isinstance(found := fields.get(name), list)]
    lists += [item for found in lists for item in found if isinstance(item, list)]
    return any(isinstance(item, dict) for found in lists for item in found)


def check(raw: bytes, route: str, adapter: TypeAdapter[Any]) -> tuple[bool, bool]:
    """Compare the readings of a body; return whether the gateway and vLLM take it."""
    ours, theirs = by_gateway(raw, route), by_vllm(raw, adapter)
    if theirs is None:
        return ours is not None, False
    assert ours is not None, "the gateway refuses what vLLM takes"
    if route != "/v1/embeddings":
        sent = by_vllm(ours.body, adapter)
        assert sent is not None, "vLLM refuses what the gateway makes of it"
        assert ours.stream is bool(theirs.stream) is bool(sent.stream)
        # MAX_TOKENS stands for all above it, which no server writes.
        written = most_tokens(sent)
        assert ours.tokens - ours.prompt_tokens >= min(written, 2**31 - 1)
        assert ours.stream_interval == (theirs.stream_interval or 1)
        if theirs.stream:
            at_end, in_all = usage_flags(theirs)
            assert usage_flags(sent) == (True, in_all)
            assert ours.hide_usage is not at_end
        else:
            assert not ours.hide_usage
    elif theirs.padding != "max_length":
        assert ours.padded_prompts == 0
    elif "input" in type(theirs).model_fields:
        inputs = inputs_of(theirs)
        assert inputs <= ours.padded_prompts
        if len(json.loads(raw).keys() & {"input", "messages"}) == 1:
            assert ours.padded_prompts <= max(1, inputs)
    return True, True


@pytest.mark.parametrize("route", MAIN)
def test_what_vllm_takes_is_taken(route: str, classes: dict[str, TypeAdapter[Any]]) -> None:
    """And no answer is longer than what is reserved for it; streams and their usage are told."""
    taken = []

    @READINGS
    @given(bodies(route, others=True))
    def compare(raw: bytes) -> None:
        taken.append(check(raw, route, classes[route])[1])

    compare()
    print(f"{route}: {len(taken)} bodies, of which vLLM takes {sum(taken)}")
    assert sum(taken) > len(taken) / 20


@pytest.mark.parametrize("route", MAIN)
def test_verdict_is_vllms(route: str, classes: dict[str, TypeAdapter[Any]]) -> None:
    """By all fields that the gateway reads, but for what is in a message."""
    taken = []

    @READINGS
    @example(b'{"model": "m", "messages": [], "input": [], "padding": "max_length"}')
    @given(bodies(route, others=False))
    def compare(raw: bytes) -> None:
        ours, theirs = check(raw, route, classes[route])
        taken.append(theirs)
        assert ours is theirs or has_messages(raw)

    compare()
    print(f"{route}: {len(taken)} bodies, of which vLLM takes {sum(taken)}")
    assert sum(taken) > len(taken) / 20
