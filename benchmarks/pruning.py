"""What budgets save: requests in flight and tokens per second at a fixed KV memory."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnserve.command import AsJson, main
from attnserve.errors import UserError
from benchmarks import RESULTS, results
from benchmarks import options as opt
from benchmarks.checkpoints import config_of, pruned_bytes, token_bytes, variant_of

if TYPE_CHECKING:
    from benchmarks.servers import Server

CSV = RESULTS / "pruning_cpu.csv"
UNPRUNED = 4
"""Unpruned requests that the default cache holds."""

BLOCK_SIZE = 128
"""Tokens of a block of vLLM's cache on a CPU."""


@dataclass(frozen=True)
class PruningPlan:
    """What is sent to both servers, and the memory that they have for it."""

    ckpt: Path
    variant: str
    kv_budgets: Sequence[int]
    prompt_len: int
    new_tokens: int
    requests: int
    rounds: int
    max_model_len: int
    dtype: str
    seed: int
    kv_cache_memory_bytes: int = 0

    def kv_bytes(self) -> tuple[int, int]:
        """Return the bytes of KV cache of a request of prompt and answer: unpruned, pruned."""
        import torch

        config, dtype = config_of(self.ckpt), getattr(torch, self.dtype)
        tokens = self.prompt_len + self.new_tokens
        unpruned = tokens * token_bytes(config, dtype, stateful=True)
        return unpruned, pruned_bytes(config, dtype, self.kv_budgets, self.max_model_len)


def plan_of(
    ckpt: Path,
    kv_budgets: Sequence[int],
    kv_cache_memory_bytes: int | None,
    max_model_len: int,
    dtype: str,
    **counts: int,
) -> PruningPlan:
    """Return the plan, with the checkpoint's own budgets if none are given.

    Raises:
        UserError: something would fail after a minute.
    """
    import torch

    from attn_kernels.variant import LEAST_BUDGET

    variant, config = variant_of(ckpt), config_of(ckpt)
    if variant is None or not variant.prunable:
        raise UserError(f"--ckpt {ckpt} has no attention that can be pruned")
    layers = config["num_hidden_layers"]
    budgets = list(kv_budgets or variant.kv_budgets)
    budgets = budgets or [max(LEAST_BUDGET, max_model_len // 16)] * layers
    if len(budgets) != layers:
        raise UserError(f"--kv-budgets has {len(budgets)} entries and the model {layers} layers")
    if counts["prompt_len"] + counts["new_tokens"] > max_model_len:
        raise UserError("prompt and answer are longer than --max-model-len")
    blocks = -(-max_model_len // BLOCK_SIZE)
    least = blocks * BLOCK_SIZE * token_bytes(config, getattr(torch, dtype), variant.stateful)
    memory = UNPRUNED * least if kv_cache_memory_bytes is None else kv_cache_memory_bytes
    if memory < least:
        raise UserError(
            f"--kv-cache-memory-bytes {memory} holds no unpruned request of {max_model_len} tokens "
            f"in {dtype}: give at least {least}, or a shorter --max-model-len"
        )
    return PruningPlan(ckpt, variant.name, budgets, max_model_len=max_model_len, dtype=dtype,
                kv_cache_memory_bytes=memory, **counts)  # fmt: skip


def pruning(
    context: typer.Context,
    ckpt: opt.Ckpt,
    kv_budgets: Annotated[
        list[int] | None,
        opt.count(
            "One a layer (default: those of config.json, else a sixteenth of --max-model-len)."
        ),
    ] = None,
    prompt_len: opt.PromptLen = 448,
    new_tokens: opt.NewTokens = 64,
    requests: Annotated[int, opt.count("Sent together in a round.")] = 128,
    rounds: Annotated[int, opt.count("Of each server.")] = 5,
    kv_cache_memory_bytes: Annotated[
        int | None,
        opt.option(
            "KV cache of each server (default: room for 4 unpruned requests of --max-model-len).",
            parser=opt.size,
            metavar="BYTES",
        ),
    ] = None,
    max_num_seqs: Annotated[int, opt.count("Of each server.")] = 256,
    max_model_len: Annotated[int, opt.count("Of each server, and the long answer's.")] = 512,
    dtype: opt.ModelDtype = opt.Dtype.FLOAT32,
    threads: opt.Threads = opt.CORES,
    seed: opt.Seed = 0,
    start_timeout: opt.StartTimeout = 600,
    csv: opt.Csv = CSV,
    no_save: opt.NoSave = False,
    log_folder: opt.LogFolder = Path(".run"),
    as_json: AsJson = False,
) -> None:
    """Measure what budgets save: requests in flight and tokens per second at a fixed KV memory.

    Attention within budgets is compared with the same checkpoint unpruned. Both
    servers are up at once and take turns; each round sends all requests together, more than either
    holds, and is timed from the first byte sent to the last token. Meanwhile the server's own
    metrics say how many requests run and how full the cache is. Ratios are made inside a round. At
    the end each server generates one long answer: a pruned one must not take more memory as it
    grows.

    What follows `--` is passed on to `vllm serve`.
    """
    from benchmarks.servers import Server, ServerOptions, run, with_all

    plan = plan_of(ckpt, kv_budgets or (), kv_cache_memory_bytes, max_model_len, dtype,
                   prompt_len=prompt_len, new_tokens=new_tokens, requests=requests,
                   rounds=rounds, seed=seed)  # fmt: skip
    save = results.checked(csv, no_save)
    options = ServerOptions(dtype, plan.kv_cache_memory_bytes, threads, True, start_timeout,
                            log_folder, context.args)  # fmt: skip
    servers = []
    for name, budgets in (("unpruned", {}), ("pruned", {"kv_budgets": plan.kv_budgets})):
        # A length that the model was not trained for costs what any other does.
        overrides = {"attention_variant": {"name": plan.variant, **budgets}}
        given = json.dumps({**overrides, "max_position_embeddings": max_model_len})
        lengths = f"--max-model-len={max_model_len}", f"--max-num-seqs={max_num_seqs}"
        servers.append(
            Server(name, ckpt, options, f"--attention-backend={plan.variant}", *lengths,
                   f"--hf-overrides={given}")
        )  # fmt: skip
    rows = run(with_all(servers, measure(servers, plan)), "python -m benchmarks.pruning")
    for row, size in zip(rows, plan.kv_bytes(), strict=True):
        row["kv_bytes_per_request"] = size
        row["running_over_ideal"] = row["running"] / (plan.kv_cache_memory_bytes / size)
    about = options.described(
        model=ckpt.resolve().name,
        kv_budgets=" ".join(map(str, plan.kv_budgets)),
        requests=requests,
        prompt_len=prompt_len,
        new_tokens=new_tokens,
        rounds=rounds,
        max_num_seqs=max_num_seqs,
    )
    shown = [{k: f"{v:.4g}" if isinstance(v, float) else v for k, v in r.items()} for r in rows]
    results.report(about, rows, results.table(shown), csv=save,
                   as_json=as_json)  # fmt: skip


async def one_round(server: Server, prompts: list[list[int]], new_tokens: int) -> tuple[float, int]:
    """Send all prompts at once; return tokens/s of the answers and the most requests in flight."""
    from benchmarks.watch import watch

    began = time.perf_counter()
    answers, seen = await watch(server, server.round(prompts, new_tokens))
    took = max(answer.tokens[-1] for answer in answers) - began
    return len(prompts) * new_tokens / took, int(max(seen.running))


async def long_answer(server: Server, length: int) -> dict[str, Any]:
    """Send one request that grows to `length` tokens; return the share of the cache that it takes
    and how the server's memory grows, in the second quarter of the time and in the last.

    Raises:
        LaunchError: it was over too soon.
    """
    from benchmarks.watch import watch
    from serving.launch.process import LaunchError

    _, seen = await watch(server, server.round([[1, 2, 3]], length - 3))
    samples = len(seen.usage)
    if samples < 8:
        raise LaunchError("the long answer was over before it was seen: give more --max-model-len")
    early, late = slice(samples // 4, samples // 2), slice(samples * 3 // 4, samples)
    return {
        "long_usage_early": median(seen.usage[early]),
        "long_usage_late": median(seen.usage[late]),
        "long_rss_growth_mb": (median(seen.rss[late]) - median(seen.rss[early])) / 1e6,
    }


async def measure(servers: Sequence[Server], plan: PruningPlan) -> list[results.Row]:
    """Run the rounds in alternation, then the long answers; return one row a server."""
    import numpy as np
    from tqdm import tqdm

    rng = np.random.default_rng(plan.seed)
    vocabulary = config_of(plan.ckpt)["vocab_size"]
    found: dict[str, list[tuple[float, int]]] = {server.name: [] for server in servers}
    for server in servers:
        await server.round([[1] * plan.prompt_len], 4)
    for index in tqdm(range(plan.rounds), unit="round", mininterval=5):
        prompts = rng.integers(1, vocabulary, (plan.requests, plan.prompt_len)).tolist()
        for server in servers[:: -1 if index % 2 else 1]:
            found[server.name].append(await one_round(server, prompts, plan.new_tokens))
    rows = []
    for server in servers:
        mine = found[server.name]
        pairs = zip(mine, found[servers[0].name], strict=True)
        ratios = [rate / first for (rate, _), (first, _) in pairs]
        row: results.Row = {"server": server.name, "running": max(most for _, most in mine)}
        row |= {"tokens_per_s": median(rate for rate, _ in mine), "ratio": median(ratios)}
        row |= {"ratio_min": min(ratios), "ratio_max": max(ratios)}
        rows.append(row | await long_answer(server, plan.max_model_len))
    return rows


if __name__ == "__main__":
    main(pruning, "python -m benchmarks.pruning", others=True)
