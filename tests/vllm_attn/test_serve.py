"""Every variant from a real `vllm serve`: its greedy tokens are those of the float64 reference."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import pytest

from attn_kernels import get_variant, variant_names
from serving.upstream.vllm_metrics import ServerInfo
from tests.reference_model import clear_greedy
from tests.servers import vllm_server
from tests.tiny import tiny_checkpoint
from tests.vllm_attn.client import Client

NUM_TOKENS = 24
PROMPT_LENGTHS = (3, 7, 16, 17, 33, 63, 64, 65, 100, 129, 150, 200)
"""Around the cache block (16) and the chunk (64), and prompts of several chunks."""

LIKE_ANOTHER = ("sinks", "softmax1", "sigmoid", "ssmax", "lssa")
"""What differs from softmax and lssar is in the kernels and the learned tensors, which other tests
serve: test_architectures.py a model with sinks."""

CASES = [
    *((name, None) for name in variant_names() if name not in LIKE_ANOTHER),
    *(pytest.param((name, None), marks=pytest.mark.slow) for name in LIKE_ANOTHER),
    ("softpick", 24),
    pytest.param(("forgetting", 24), marks=pytest.mark.slow),
    pytest.param(("selective", 24), marks=pytest.mark.slow),
]
SERVE_ARGS = (
    "--dtype=float32",
    "--max-num-batched-tokens=64",  # prefill in chunks, mixed with the decoding of other requests
    "--max-num-seqs=16",
    "--block-size=16",
    "--max-model-len=256",
    "--num-gpu-blocks-override=32",  # half of what twelve requests need: some are preempted
)


@dataclass
class Served:
    """A served checkpoint, prompts, and what the reference answers to each."""

    variant_name: str
    window: int | None
    client: Client
    prompts: list[list[int]]
    expected: list[list[int]]


@pytest.fixture(scope="module", params=CASES, ids=lambda case: f"{case[0]}-window_{case[1]}")
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    name, window = request.param
    ckpt = tmp_path_factory.mktemp(name)
    tiny_checkpoint(ckpt, name, sliding_window=window)
    prompts, expected = zip(
        *(clear_greedy(ckpt, n, NUM_TOKENS) for n in PROMPT_LENGTHS), strict=True
    )
    with vllm_server(ckpt, f"--attention-backend={name}", *SERVE_ARGS) as server:
        yield Served(
            name, window, Client(server), list(prompts), [answer.tokens for answer in expected]
        )


def test_answers_differ(served: Served) -> None:
    """The comparison below means something: answers are no constant."""
    assert len({tuple(tokens) for tokens in served.expected}) > len(served.expected) // 2
    assert len({token for tokens in served.expected for token in tokens}) > 20


def test_says_what_it_runs(served: Served) -> None:
    assert served.client.server_info() == ServerInfo(
        model_name=served.client.model,
        variant=served.variant_name,
        weight_bits="32",
        embedding_bits="32",
        weight_method="none",
        kv_cache_dtype="float32",
    )


def test_alone(served: Served) -> None:
    for prompt, expected in zip(served.prompts, served.expected, strict=True):
        assert served.client.greedy(prompt, NUM_TOKENS) == expected


def test_streamed(served: Served) -> None:
    for prompt, expected in zip(served.prompts[::2], served.expected[::2], strict=True):
        assert served.client.greedy_streamed(prompt, NUM_TOKENS) == expected


def test_twelve_at_once(served: Served) -> None:
    assert served.client.greedy_together(served.prompts, NUM_TOKENS) == served.expected


def test_preempted(served: Served) -> None:
    """A request that loses its blocks to another is computed again from its first token."""
    assert served.client.greedy_batch(served.prompts, NUM_TOKENS) == served.expected
    if served.window is None:  # a window keeps few blocks: there is room for all
        assert served.client.metric("vllm:num_preemptions_total") > 0, "no request was preempted"


def test_prefix_cache(served: Served) -> None:
    """A repeated prompt, and one that goes on where an answer ended, reuse cached blocks."""
    prompt, expected = served.prompts[-1], served.expected[-1]
    before = served.client.metric("vllm:prefix_cache_hits_total")
    assert served.client.greedy(prompt, NUM_TOKENS) == expected
    assert served.client.greedy(prompt, NUM_TOKENS) == expected
    assert served.client.greedy(prompt + expected[:20], 4) == expected[20:]
    hits = served.client.metric("vllm:prefix_cache_hits_total") - before
    if get_variant(served.variant_name).stateful:
        assert hits == 0, "a stateful variant's accumulators cannot be shared"
    else:
        assert hits >= 2 * len(prompt) // 16 * 16
