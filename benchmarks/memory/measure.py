"""The memory of one server: what its checkpoint says it must be, and what it is."""

from __future__ import annotations

import re
import signal
from collections.abc import Sequence
from typing import Any

import aiohttp
import numpy as np
import torch

from attn_kernels import get_variant
from benchmarks.checkpoints import ServerCase, config_of, pruned_bytes, token_bytes, weight_bytes
from benchmarks.options import RequestOptions, ServerOptions
from benchmarks.servers import Server, started, watch, while_alive

BLOCK_SIZE = 128
"""Tokens of vLLM's blocks on a CPU."""


def predict(case: ServerCase, requests: RequestOptions, options: ServerOptions) -> dict[str, float]:
    """Return what is measured, too, by the same names.

    A request takes whole blocks in every layer, or one KV page of fixed size within budgets. Per
    token is per request by the request's tokens. The cache has as many whole blocks as fit; one of
    them is vLLM's own.
    """
    config, dtype = config_of(case.ckpt), getattr(torch, case.dtype)
    blocks_of_request = -(-requests.length // BLOCK_SIZE)
    token = token_bytes(config, dtype, get_variant(case.variant))
    request = blocks_of_request * BLOCK_SIZE * token
    if case.kv_budgets:
        blocks_of_request = 1
        request = pruned_bytes(config, dtype, case.kv_budgets, requests.length)
    block = request // blocks_of_request
    blocks = options.kv_cache_memory_bytes // block
    weights = weight_bytes(case.ckpt, case.dtype)
    groups = config.get("quantization_config", {}).get("config_groups", {})
    if len(groups) < 2:  # quant.quantize's second group are the embeddings
        # vLLM 0.32 on a CPU packs unquantized embeddings and the head for oneDNN, each of them,
        # tied or not, and keeps what it has packed.
        weights += 2 * config["vocab_size"] * config["hidden_size"] * dtype.itemsize
    return {
        "kv_bytes_per_token": request / requests.length,
        "kv_bytes_per_request": request,
        "requests_in_flight": max(0, blocks - 1) // blocks_of_request,
        "kv_cache_bytes": blocks * block,
        "weight_bytes": weights,
    }


def requests_of(predicted: dict[str, float]) -> int:
    """Return how many are sent at once: more than fit."""
    return int(predicted["requests_in_flight"] * 1.25) + 4


async def taken_by(server: Server) -> tuple[dict[str, int], int]:
    """Return what the worker says of its memory, and how many blocks its cache has."""
    url = f"{server.service.url}/collective_rpc"
    server.signal(signal.SIGCONT)
    try:
        async with aiohttp.ClientSession(raise_for_status=True) as session:
            async with session.post(url, json={"method": "memory_taken"}) as answer:
                taken: dict[str, int] = (await answer.json())["results"][0]
            found = re.search(r'num_gpu_blocks="(\d+)"', await server.metrics(session))
    except aiohttp.ClientError as error:
        raise server.service.failed(f"does not tell its memory ({error})") from error
    assert found is not None
    return taken, int(found[1])


async def measure(
    case: ServerCase, requests: RequestOptions, options: ServerOptions, vllm_args: Sequence[str]
) -> dict[str, Any]:
    """Start a case's server and measure what was predicted, with the same names, and more."""
    sent = requests_of(predict(case, requests, options))
    # With the worker's own measurements; nothing but the KV cache limits how many requests run.
    server = Server(
        case.name, case.ckpt, options, *case.arguments(), f"--max-model-len={requests.length}",
        f"--max-num-seqs={sent}", "--no-enable-prefix-caching", "--load-format=measured",
        "--worker-extension-cls=benchmarks.memory.worker.Memory", *vllm_args,
    )  # fmt: skip
    # For /collective_rpc; and else it reads all steps that wait for it before it answers /metrics.
    server.environment |= {"VLLM_SERVER_DEV_MODE": "1", "VLLM_V1_OUTPUT_PROC_CHUNK_SIZE": "1"}
    rng = np.random.default_rng(requests.seed)
    vocabulary = config_of(case.ckpt)["vocab_size"]
    prompts = rng.integers(1, vocabulary, (sent, requests.prompt_len)).tolist()

    async def work() -> dict[str, Any]:
        await server.generate(prompts[:1], 4)
        taken, blocks = await taken_by(server)
        idle = server.rss()
        pss = sum(process.memory_full_info().pss for process in server.processes())
        _, alone = await watch(server, server.generate(prompts[:1], requests.new_tokens))
        _, full = await watch(server, server.generate(prompts, requests.new_tokens))
        taken_blocks = round(max(alone.usage) * (blocks - 1))  # one block is vLLM's own
        request = taken_blocks * taken["allocated"] / blocks
        return {
            "kv_bytes_per_token": request / requests.length,
            "kv_bytes_per_request": request,
            "requests_in_flight": int(max(full.running)),
            "kv_cache_bytes": taken["resident"],
            "weight_bytes": taken["weights"],
            "blocks": blocks,
            "pss_bytes": pss,
            "rss_bytes": idle,
            "rss_full_bytes": max(full.rss),
        }

    async with started([server]) as failed:
        if failed:
            raise failed[server]
        return await while_alive(server.service, work())
