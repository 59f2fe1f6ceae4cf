"""What a user finds after plain `make serve`: chat with the default checkpoint, and its real name
and what it runs wherever a model is named."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.servers import Server, vllm_server
from tests.serving.helpers import MODEL, ask, gateway_server, metric
from tests.serving.standin import wait_for

CHECKPOINT = Path(__file__).parents[2] / "checkpoints" / "softpick"
MESSAGES: Any = [
    {"role": "system", "content": "A novel."},
    {"role": "user", "content": "“Who goes there?” said the old man."},
]
FIELDS: dict[str, Any] = {"temperature": 0, "max_tokens": 24}


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Serve the default checkpoint under its folder's name, with the launcher's gateway."""
    with (
        vllm_server(CHECKPOINT, "--served-model-name=softpick") as upstream,
        gateway_server(upstream.url, tmp_path_factory.mktemp("gateway")) as gateway,
    ):
        # Until it knows what the server runs, requests have no labels.
        wait_for(lambda: ask(gateway.url, "GET", "/health").status == 200, "it has asked once")
        yield gateway


def client(server: Server) -> openai.OpenAI:
    """OpenAI's own."""
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)


def test_chat(served: Server) -> None:
    """Whole and streamed, the same text; it goes on where the template ends."""
    chat = client(served).chat.completions
    answer = chat.create(model="softpick", messages=MESSAGES, **FIELDS)
    text = answer.choices[0].message.content
    assert len(text) > 20
    events = chat.create(model="softpick", messages=MESSAGES, stream=True, **FIELDS)
    assert "".join(event.choices[0].delta.content or "" for event in events) == text
    prompt = "A novel.\n\n“Who goes there?” said the old man.\n\n"
    plain = client(served).completions.create(model="softpick", prompt=prompt, **FIELDS)
    assert plain.choices[0].text == text


def test_what_it_runs(served: Server) -> None:
    (model,) = ask(served.url, "GET", "/v1/models").json()["data"]
    assert model["id"] == "softpick"
    assert model["attnserve"] == {
        "variant": "softpick",
        "bits": 16,
        "embedding_bits": 16,
        "weight_method": "none",
        "kv_cache_dtype": "bfloat16",
        "kv_budgets": None,
        "unconfirmed": [],
        "errors": [],
    }
    client(served).completions.create(model="softpick", prompt="x", max_tokens=2)
    labels = 'bits="16",model="softpick",variant="softpick"'
    assert metric(served.url, f"attnserve_completion_tokens_total{{{labels}}}") >= 2
    assert 'model="*"' not in ask(served.url, "GET", "/metrics").body.decode()
    assert list(ask(served.url, "GET", "/health").json()["models"]) == ["softpick"]
    with pytest.raises(openai.NotFoundError):  # nobody's name has no one's labels
        client(served).completions.create(model="gpt-4", prompt="x")
    page = ask(served.url, "GET", "/metrics").body.decode()
    assert 'bits="",model="*",variant=""' in page
    assert not re.search(r'bits="16",model="\*"', page)


def test_checkpoint_without_a_template(gateway: Server) -> None:
    """vLLM's own error, and completions work; the server has no plugin and says nothing."""
    with pytest.raises(openai.BadRequestError, match="you must provide a chat template"):
        client(gateway).chat.completions.create(model=MODEL, messages=MESSAGES)
    assert client(gateway).completions.create(model=MODEL, prompt="x").choices
    (model,) = ask(gateway.url, "GET", "/v1/models").json()["data"]
    assert (model["id"], model["attnserve"]["variant"]) == (MODEL, "")
    assert model["attnserve"]["bits"] is None
    assert list(ask(gateway.url, "GET", "/health").json()["models"]) == [MODEL]
