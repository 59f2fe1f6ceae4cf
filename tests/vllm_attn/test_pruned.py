"""Selective attention within budgets from a real `vllm serve`: its tokens are those of the rule
carried out token by token in float64, and memory holds the budgets and no more."""

from __future__ import annotations

import json
import time
import urllib.request
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from tests.reference_model import clear_greedy, reference_greedy
from tests.servers import vllm_server
from tests.tiny import tiny_checkpoint
from tests.vllm_attn.client import Client

NUM_TOKENS = 24
PROMPT_LENGTHS = (1, 3, 4, 5, 8, 11, 13, 63, 64, 65, 129, 200)
"""Around the budgets and the chunk (64)."""

BUDGETS = [8, 4, 12]
PAGE_BYTES = sum(BUDGETS) * (2 * 2 * 32 * 4 + 8)  # 2 KV heads of 32 float32, and two numbers
KV_BYTES = 1 << 18
NUM_PAGES = KV_BYTES // PAGE_BYTES
FIT = NUM_PAGES - 1  # vLLM keeps one for padding
TRIES = 100  # to meet running requests: a busy machine may answer only when they are over

ENV = {
    "VLLM_SERVER_DEV_MODE": "1",  # /reset_prefix_cache, which can preempt
    # Else it reads all steps that wait for it before it answers /metrics: often after the last.
    "VLLM_V1_OUTPUT_PROC_CHUNK_SIZE": "1",
}
SERVE_ARGS = (
    "--attention-backend=selective",
    "--dtype=float32",
    "--max-model-len=256",
    "--max-num-seqs=64",
    f"--kv-cache-memory-bytes={KV_BYTES}",
)

CASES = [
    pytest.param(("--max-num-batched-tokens=64",), id="chunks_of_64"),
    pytest.param(("--max-num-batched-tokens=65",), id="chunks_of_65", marks=pytest.mark.slow),
    pytest.param(("--max-num-batched-tokens=4096",), id="whole_prompts", marks=pytest.mark.slow),
    pytest.param(
        ("--max-num-batched-tokens=128", "--no-enforce-eager"),
        id="compiled",
        marks=pytest.mark.slow,
    ),
]


@dataclass
class Served:
    """A served checkpoint, prompts, and what the rule answers to each."""

    ckpt: Path
    client: Client
    prompts: list[list[int]]
    expected: list[list[int]]

    def sample(self, work: Future[Any], *metrics: str) -> list[tuple[float, ...]]:
        """Return the metrics' values while `work` goes on."""
        values = []
        while not work.done():
            values.append(self.client.metrics(*metrics))
            time.sleep(0.01)
        return values


@pytest.fixture(scope="module", params=CASES)
def served(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[Served]:
    ckpt = tmp_path_factory.mktemp("pruned")
    tiny_checkpoint(ckpt, {"name": "selective", "kv_budgets": BUDGETS})
    prompts, expected = zip(
        *(clear_greedy(ckpt, n, NUM_TOKENS) for n in PROMPT_LENGTHS), strict=True
    )
    with vllm_server(ckpt, *SERVE_ARGS, *request.param, env=ENV) as server:
        yield Served(ckpt, Client(server), list(prompts), [answer.tokens for answer in expected])


def test_says_what_it_runs(served: Served) -> None:
    info = served.client.server_info()
    assert (info.variant, info.kv_budgets) == ("selective", "8,4,12")


def test_pruning_matters(served: Served) -> None:
    """The comparisons below mean something: unpruned, most of the long answers are others."""
    unpruned = {"name": "selective"}
    long = [i for i, length in enumerate(PROMPT_LENGTHS) if length > 60]
    answers = [
        reference_greedy(served.ckpt, served.prompts[i], NUM_TOKENS, unpruned).tokens for i in long
    ]
    differ = sum(answer != served.expected[i] for answer, i in zip(answers, long, strict=True))
    assert differ > len(long) // 2


def test_alone(served: Served) -> None:
    for prompt, expected in zip(served.prompts, served.expected, strict=True):
        assert served.client.greedy(prompt, NUM_TOKENS) == expected


def test_twelve_at_once(served: Served) -> None:
    """Decoding of some beside chunks of others; pages that earlier requests have used."""
    assert served.client.greedy_together(served.prompts, NUM_TOKENS) == served.expected
    assert served.client.greedy_batch(served.prompts, NUM_TOKENS) == served.expected


def test_preempted(served: Served) -> None:
    """A request that loses its page is computed again from its first token."""
    preemptions = "vllm:num_preemptions_total"
    before = served.client.metric(preemptions)
    url = f"{served.client.server.url}/reset_prefix_cache?reset_running_requests=true"
    for _ in range(TRIES):  # until it meets running requests
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(served.client.greedy_batch, served.prompts * 8, NUM_TOKENS)
            while not work.done():
                urllib.request.urlopen(urllib.request.Request(url, method="POST")).close()
                if served.client.metric(preemptions) > before:
                    break
            assert work.result() == served.expected * 8
        if served.client.metric(preemptions) > before:
            return
    raise AssertionError("nothing was preempted")


def test_as_many_requests_as_pages(served: Served) -> None:
    """vLLM's own figure, the plugin's line, and what really runs at once."""
    log = served.client.server.log()
    assert f"Maximum concurrency for 256 tokens per request: {NUM_PAGES}.00x" in log
    whole = 3 * 256 * 2 * (2 * 32 * 4 + 4)
    assert f"Pruned to kv_budgets: {PAGE_BYTES:,} bytes of KV cache a request" in log
    assert f"than the {whole:,} of an unpruned one of 256 tokens; {FIT} requests fit" in log
    prompts = [[2 + n, 3, 4] for n in range(40)]
    running: list[tuple[float, ...]] = [(0.0,)]
    for _ in range(TRIES):
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(served.client.greedy_batch, prompts, 200)
            running += served.sample(work, "vllm:num_requests_running")
        assert len(work.result()) == len(prompts)
        if max(running) >= (FIT,):
            break
    assert max(running) == (FIT,)


def test_blocks_do_not_grow(served: Served) -> None:
    """One page from the first token to far beyond the largest budget."""
    names = "vllm:num_requests_running", "vllm:kv_cache_usage_perc"
    usage: list[float] = []
    while len(usage) < 20:
        with ThreadPoolExecutor(1) as pool:
            work = pool.submit(served.client.greedy, [5, 6, 7], 250)
            usage += [usage for running, usage in served.sample(work, *names) if running]
    assert usage == [pytest.approx(1 / FIT)] * len(usage)


def test_prefix_caching_finds_nothing(served: Served) -> None:
    prompt, expected = served.prompts[-1], served.expected[-1]
    for _ in range(2):
        assert served.client.greedy(prompt, NUM_TOKENS) == expected
    assert served.client.metric("vllm:prefix_cache_hits_total") == 0


@pytest.mark.slow
def test_ample_budgets_given_at_start_up(tmp_path: Path) -> None:
    """`--hf-overrides` gives budgets; with as many as tokens nothing is pruned, and the answers are
    those of unpruned selective attention."""
    tiny_checkpoint(tmp_path, "selective")
    budgets = {"attention_variant": {"name": "selective", "kv_budgets": [256] * 3}}
    memory = "--kv-cache-memory-bytes=1M"
    with vllm_server(
        tmp_path, *SERVE_ARGS, memory, f"--hf-overrides={json.dumps(budgets)}"
    ) as server:
        client = Client(server)
        assert "1 requests fit (unpruned: 2)" in server.log()
        for length in PROMPT_LENGTHS[::4]:
            prompt, expected = clear_greedy(tmp_path, length, NUM_TOKENS)
            assert client.greedy(prompt, NUM_TOKENS) == expected.tokens
