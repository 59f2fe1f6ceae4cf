"""What budgets save: requests in flight and tokens per second at a fixed KV memory.

Selective attention within its budgets is compared with the same checkpoint unpruned. Both servers
are up at once and take turns; each round sends all requests together, more than either holds, and
is timed from the first byte sent to the last token. Meanwhile the server's own metrics say how many
requests run and how full the cache is. Ratios are made inside a round. At the end each server
generates one long answer: a pruned one must not take more memory as it grows.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pandas as pd
import torch
from tqdm import tqdm

from attn_kernels import VariantError, variant_from_config
from attn_kernels.paged import STATE_BYTES
from attn_kernels.pruning import slot_bytes
from attn_kernels.variant import LEAST_BUDGET
from attnserve import machine
from attnserve.options import command_line, positive
from benchmarks import RESULTS
from benchmarks.servers import Server, append_csv, config_of, run
from benchmarks.watch import watched
from serving.launch.process import LaunchError

CSV = RESULTS / "pruning_cpu.csv"

DTYPES = ("float32", "bfloat16", "float16")
UNPRUNED = 4
"""Unpruned requests that the default cache holds."""
BLOCK = 128
"""Tokens of a block of vLLM's cache on a CPU."""


@dataclass(frozen=True)
class Round:
    """What one round of all requests gave."""

    tokens_per_s: float
    """Of the answers."""
    running: int
    """The most requests at once."""


class Peer(Server):
    """A server, pruned or not."""

    def __init__(self, name: str, variant: dict[str, Any], options: argparse.Namespace) -> None:
        o = options
        arguments = [f"--attention-backend={o.variant}", f"--dtype={o.dtype}", "--enforce-eager"]
        arguments += [f"--max-model-len={o.max_model_len}", f"--max-num-seqs={o.max_num_seqs}"]
        arguments += [f"--kv-cache-memory-bytes={o.kv_cache_memory_bytes}"]
        # A length that the model was not trained for costs what any other does.
        overrides = {"attention_variant": variant, "max_position_embeddings": o.max_model_len}
        arguments += [f"--hf-overrides={json.dumps(overrides)}"]
        super().__init__(name, o.ckpt, [*arguments, *o.vllm_args], o.threads, o.log_folder)


async def one_round(peer: Peer, prompts: list[list[int]], new_tokens: int) -> Round:
    """All prompts at once."""
    async with watched(peer) as seen:
        began = time.perf_counter()
        answers = await peer.round(prompts, new_tokens)
    took = max(answer.tokens[-1] for answer in answers) - began
    if not seen.running:
        raise LaunchError("the requests were over before they were seen: give more --new-tokens")
    return Round(len(prompts) * new_tokens / took, int(max(seen.running)))


async def long_answer(peer: Peer, length: int) -> dict[str, Any]:
    """One request that grows to `length` tokens: the cache it takes and the server's memory, in the
    second quarter of the time and in the last."""
    async with watched(peer) as seen:
        await peer.round([[1, 2, 3]], length - 3)
    count = len(seen.usage)
    if count < 8:
        raise LaunchError("the long answer was over before it was seen: give more --max-model-len")
    early, late = slice(count // 4, count // 2), slice(count * 3 // 4, count)
    return {
        "long_usage_early": median(seen.usage[early]),
        "long_usage_late": median(seen.usage[late]),
        "long_rss_growth_mb": (median(seen.rss[late]) - median(seen.rss[early])) / 1e6,
    }


async def measure(peers: Sequence[Peer], options: argparse.Namespace) -> list[dict[str, Any]]:
    """Rounds in alternation, then the long answers; one row a server."""
    rng = np.random.default_rng(options.seed)
    vocabulary = config_of(options.ckpt)["vocab_size"]
    shape = (options.requests, options.prompt_len)
    rounds: list[list[Round]] = [[] for _ in peers]
    for peer in peers:
        await peer.round([[1] * options.prompt_len], 4)
    for index in tqdm(range(options.rounds), unit="round", mininterval=5):
        prompts = rng.integers(1, vocabulary, shape).tolist()
        for i in (0, 1) if index % 2 == 0 else (1, 0):
            rounds[i].append(await one_round(peers[i], prompts, options.new_tokens))
    rows = []
    for peer, mine in zip(peers, rounds, strict=True):
        ratios = [r.tokens_per_s / o.tokens_per_s for r, o in zip(mine, rounds[0], strict=True)]
        rows.append(
            {
                "server": peer.name,
                "running": max(r.running for r in mine),
                "tokens_per_s": median(r.tokens_per_s for r in mine),
                "ratio": median(ratios),
                "ratio_min": min(ratios),
                "ratio_max": max(ratios),
                **await long_answer(peer, options.max_model_len),
            }
        )
    return rows


def kv_bytes(options: argparse.Namespace) -> tuple[int, int]:
    """Bytes of KV cache of a request of prompt and answer: `(unpruned, pruned)`."""
    kv_heads, head_size, dtype = shape(options)
    slots = sum(min(budget, options.max_model_len) for budget in options.kv_budgets)
    tokens = options.prompt_len + options.new_tokens
    return tokens * token_bytes(options), slots * slot_bytes(kv_heads, head_size, dtype)


def token_bytes(options: argparse.Namespace) -> int:
    """Bytes of KV cache of a token that is kept in every layer."""
    kv_heads, head_size, dtype = shape(options)
    a_layer = kv_heads * (2 * head_size * dtype.itemsize + STATE_BYTES)
    return len(options.kv_budgets) * a_layer


def shape(options: argparse.Namespace) -> tuple[int, int, torch.dtype]:
    """KV heads, head size and the cache's type."""
    config = config_of(options.ckpt)
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_size = config.get("head_dim") or config["hidden_size"] // heads
    return kv_heads, head_size, getattr(torch, options.dtype)


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line, with the checkpoint's own budgets if none are given."""
    parser, add = command_line("benchmarks.pruning", __doc__)
    add("--ckpt", "the checkpoint's folder", type=Path, required=True)
    parser.add_argument(
        "--kv-budgets",
        nargs="+",
        type=int,
        help="one a layer (default: those of config.json, else a sixteenth of --max-model-len)",
    )
    add("--prompt-len", "tokens of a prompt", type=positive, default=448)
    add("--new-tokens", "tokens of an answer", type=positive, default=64)
    add("--requests", "sent together in a round", type=positive, default=128)
    add("--rounds", "of each server", type=positive, default=5)
    parser.add_argument(
        "--kv-cache-memory-bytes",
        type=positive,
        help=f"of each server (default: room for {UNPRUNED} unpruned requests of --max-model-len)",
    )
    add("--max-num-seqs", "of each server", type=positive, default=256)
    add("--max-model-len", "of each server, and the long answer's", type=positive, default=512)
    add("--dtype", "of the model and its cache", choices=DTYPES, default="float32")
    add("--threads", "OpenMP threads of a server", type=positive, default=machine.cores())
    add("--seed", "of the random prompts", type=int, default=0)
    add("--start-timeout", "longest start of both servers, in s", type=positive, default=600)
    add("--csv", "rows are added to it", type=Path, default=CSV)
    add("--log-folder", "where the servers' logs go", type=Path, default=Path(".run"))
    parser.add_argument("--no-save", action="store_true", help="write no CSV")
    parser.add_argument(
        "vllm_args", nargs="*", metavar="-- VLLM_ARGS", help="further arguments of `vllm serve`"
    )
    options = parser.parse_args(arguments)
    options.variant, options.kv_budgets = check(options)
    least = (options.max_model_len + BLOCK - 1) // BLOCK * BLOCK * token_bytes(options)
    if options.kv_cache_memory_bytes is None:
        options.kv_cache_memory_bytes = UNPRUNED * least
    if options.kv_cache_memory_bytes < least:
        raise LaunchError(
            f"--kv-cache-memory-bytes {options.kv_cache_memory_bytes} holds no unpruned request of "
            f"{options.max_model_len} tokens in {options.dtype}: give at least {least}, or a "
            "shorter --max-model-len",
            2,
        )
    return options


def check(options: argparse.Namespace) -> tuple[str, list[int]]:
    """The variant's name and the budgets; refuse now what would fail after a minute.

    Raises:
        LaunchError: with the reason in one line.
    """
    try:
        config = config_of(options.ckpt)
        variant = variant_from_config(config)
    except VariantError as error:
        raise LaunchError(f"{options.ckpt}: {error}", 2) from None
    if variant is None or not variant.prunable:
        raise LaunchError(f"--ckpt {options.ckpt} has no attention that can be pruned", 2)
    layers = config["num_hidden_layers"]
    budgets = options.kv_budgets or list(variant.kv_budgets)
    budgets = budgets or [max(LEAST_BUDGET, options.max_model_len // 16)] * layers
    if len(budgets) != layers:
        raise LaunchError(
            f"--kv-budgets has {len(budgets)} entries and the model {layers} layers", 2
        )
    if options.prompt_len + options.new_tokens > options.max_model_len:
        raise LaunchError("prompt and answer are longer than --max-model-len", 2)
    return variant.name, budgets


def described(options: argparse.Namespace) -> dict[str, Any]:
    """What the run was made on and with."""
    names = ("requests", "prompt_len", "new_tokens", "rounds", "dtype", "threads", "max_num_seqs")
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.cpu_model(),
        "cores": machine.cores(),
        "vllm": machine.package("vllm"),
        "torch": machine.package("torch"),
        "commit": machine.commit(),
        "model": options.ckpt.resolve().name,
        "kv_budgets": " ".join(map(str, options.kv_budgets)),
        "kv_cache_memory_bytes": options.kv_cache_memory_bytes,
        **{name: getattr(options, name) for name in names},
        "vllm_args": " ".join(options.vllm_args),
    }


def main() -> None:
    """Command line: the table, and as last line one JSON object."""
    try:
        options = parse()
        unpruned = {"name": options.variant}
        peers = [
            Peer("unpruned", unpruned, options),
            Peer("pruned", unpruned | {"kv_budgets": options.kv_budgets}, options),
        ]
        rows = asyncio.run(run(peers, measure(peers, options), options.start_timeout))
    except LaunchError as error:
        print(f"benchmarks.pruning: {error}", file=sys.stderr)
        sys.exit(error.code)
    except (asyncio.CancelledError, KeyboardInterrupt):
        print("benchmarks.pruning: interrupted; all servers are stopped", file=sys.stderr)
        sys.exit(130)
    for row, size in zip(rows, kv_bytes(options), strict=True):
        row["kv_bytes_per_request"] = size
        row["running_over_ideal"] = row["running"] / (options.kv_cache_memory_bytes / size)
    about = described(options)
    if not options.no_save:
        append_csv(options.csv, about, rows)
    print(pd.DataFrame(rows).to_string(index=False, float_format=lambda x: f"{x:.4g}"))
    print(json.dumps({**about, "rows": rows}))


if __name__ == "__main__":
    main()
