"""Beside stock vLLM: softmax gives the same tokens, and a plain Llama runs with any variant."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from benchmarks.smollm2 import write_smollm2
from tests.reference_model import reference_greedy
from tests.servers import vllm_server
from tests.tiny import tiny_checkpoint, tiny_tokenizer
from tests.tiny_models import tiny_model
from tests.vllm_attn.client import Client

NUM_TOKENS = 24
TEXTS = (
    "The capital of France is",
    "Once upon a time, in a village by the sea, there lived",
    "def fibonacci(n):\n",
    "Water boils at one hundred degrees because",
    "Dear Sir,\nI am writing to you about",
    "Here is a list of the planets of the solar system, from the sun outwards: Mercury, Venus,",
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a pretrained model: 9 heads, 3 KV heads, float32."""
    return write_smollm2(tmp_path_factory.mktemp("smollm2"))


@pytest.fixture(scope="module")
def tiny_softmax(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a checkpoint that names softmax: vLLM's own attention may serve no other."""
    return tiny_checkpoint(tmp_path_factory.mktemp("softmax"), "softmax")


@pytest.mark.parametrize(
    "checkpoint", ["tiny_softmax", pytest.param("smollm2", marks=pytest.mark.slow)]
)
def test_same_tokens_as_stock(checkpoint: str, request: pytest.FixtureRequest) -> None:
    folder = request.getfixturevalue(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    prompts = [tokenizer(text)["input_ids"] for text in TEXTS]
    answers = {}
    for backend in ("softmax", "cpu_attn"):
        args = ("--dtype=float32", "--max-model-len=512", f"--attention-backend={backend}")
        with vllm_server(folder, *args) as server:
            client = Client(server)
            assert client.server_info().variant == "softmax"
            alone = [client.greedy(prompt, NUM_TOKENS) for prompt in prompts]
            together = client.greedy_together(prompts, NUM_TOKENS)
            answers[backend] = alone, together
            assert ("Using SOFTMAX backend" in server.log()) == (backend == "softmax")
    assert answers["softmax"] == answers["cpu_attn"]


@pytest.fixture(scope="module")
def plain_llama(tiny_softmax: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the same weights as a checkpoint that has never heard of variants."""
    folder = tmp_path_factory.mktemp("llama")
    for file in tiny_softmax.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    config = json.loads((folder / "config.json").read_text())
    del config["attention_variant"], config["sliding_window"]
    config |= {"model_type": "llama", "architectures": ["LlamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def test_any_variant_on_a_plain_llama(plain_llama: Path) -> None:
    """The experiment people make first is allowed, named as such, and computed right."""
    prompt = list(range(40, 120))
    expected = reference_greedy(plain_llama, prompt, NUM_TOKENS, {"name": "lssa"})
    assert min(expected.margins) > 1e-3
    assert expected.tokens != reference_greedy(plain_llama, prompt, NUM_TOKENS).tokens
    args = ("--dtype=float32", "--max-model-len=256", "--attention-backend=lssa")
    with vllm_server(plain_llama, *args) as server:
        assert Client(server).server_info().variant == "lssa"
        assert Client(server).greedy(prompt, NUM_TOKENS) == expected.tokens
        assert "was trained with softmax attention; serving it with lssa is an" in server.log()


@pytest.mark.slow
def test_fast_prefill_of_layers_that_share_keys(tmp_path: Path) -> None:
    """vLLM copies a step's metadata into a class of its own there. The answers are stock vLLM's
    without it."""
    tiny_model("gemma3n_text").save_pretrained(tmp_path)
    tiny_tokenizer(512).save_pretrained(tmp_path)
    prompts = [list(range(40, 120)), list(range(200, 250))]
    answers = []
    for args in (["cpu_attn"], ["softmax", "--kv-sharing-fast-prefill"]):
        args = ["--dtype=float32", "--max-model-len=256", "--attention-backend", *args]
        with vllm_server(tmp_path, *args) as server:
            client = Client(server)
            alone = [client.greedy(prompt, NUM_TOKENS) for prompt in prompts]
            answers.append((alone, client.greedy_together(prompts, NUM_TOKENS)))
    assert len({token for answer in answers[0][0] for token in answer}) > 3
    assert answers[0] == answers[1]
