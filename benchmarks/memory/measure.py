"""The memory of one server."""

from __future__ import annotations

import argparse
import re
import signal
from typing import Any

import aiohttp
import numpy as np

from benchmarks.cases import Case, CaseServer
from benchmarks.servers import config_of, started, while_alive
from benchmarks.watch import Watched, metrics, processes, rss, watched
from serving.launch.process import LaunchError


def requests_of(predicted: dict[str, float]) -> int:
    """How many are sent at once: more than fit."""
    return int(predicted["requests_in_flight"] * 1.25) + 4


def server_of(case: Case, predicted: dict[str, float], options: argparse.Namespace) -> CaseServer:
    """A case's server, with the worker's own measurements; nothing but the KV cache limits how many
    requests run."""
    server = CaseServer(
        case,
        options,
        f"--max-model-len={options.prompt_len + options.new_tokens}",
        f"--max-num-seqs={requests_of(predicted)}",
        "--no-enable-prefix-caching",
        "--load-format=measured",
        "--worker-extension-cls=benchmarks.memory.worker.Memory",
    )
    server.environment["VLLM_SERVER_DEV_MODE"] = "1"  # for /collective_rpc
    return server


async def told(server: CaseServer) -> tuple[dict[str, int], int]:
    """What the worker says of its memory, and how many blocks its cache has."""
    url = f"{server.service.url}/collective_rpc"
    server.signal(signal.SIGCONT)
    try:
        async with aiohttp.ClientSession(raise_for_status=True) as session:
            async with session.post(url, json={"method": "memory_taken"}) as answer:
                taken: dict[str, int] = (await answer.json())["results"][0]
            found = re.search(r'num_gpu_blocks="(\d+)"', await metrics(session, server))
    except aiohttp.ClientError as error:
        raise server.service.failed(f"does not tell its memory ({error})") from error
    assert found is not None
    return taken, int(found[1])


async def seen_while(server: CaseServer, prompts: list[list[int]], new_tokens: int) -> Watched:
    """What is seen while a server answers prompts that are sent together."""
    async with watched(server) as seen:
        await while_alive([server.service], server.round(prompts, new_tokens))
    if not seen.running:
        raise LaunchError("the requests were over before they were seen: give more --new-tokens")
    return seen


async def measure(
    case: Case, predicted: dict[str, float], options: argparse.Namespace
) -> dict[str, Any]:
    """Start a case's server and measure what was predicted, with the same names, and more.

    Raises:
        LaunchError: it does not start, or ends.
    """
    server = server_of(case, predicted, options)
    rng = np.random.default_rng(options.seed)
    shape = (requests_of(predicted), options.prompt_len)
    prompts = rng.integers(1, config_of(case.ckpt)["vocab_size"], shape).tolist()
    async with started([server], options.start_timeout) as failed:
        if failed:
            raise failed[server]
        await while_alive([server.service], server.round(prompts[:1], 4))
        taken, blocks = await told(server)
        idle = rss(server)
        pss = sum(process.memory_full_info().pss for process in processes(server))
        alone = await seen_while(server, prompts[:1], options.new_tokens)
        full = await seen_while(server, prompts, options.new_tokens)
    taken_blocks = round(max(alone.usage) * (blocks - 1))  # one block is vLLM's own
    request = taken_blocks * taken["allocated"] / blocks
    return {
        "kv_bytes_per_token": request / (options.prompt_len + options.new_tokens),
        "kv_bytes_per_request": request,
        "requests_in_flight": int(max(full.running)),
        "kv_cache_bytes": taken["resident"],
        "weight_bytes": taken["weights"],
        "blocks": blocks,
        "pss_bytes": pss,
        "rss_bytes": idle,
        "rss_full_bytes": max(full.rss),
    }
