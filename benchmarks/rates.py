"""Tokens per second and time to first token of `vllm serve`, by attention backend."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnserve.command import AsJson, main
from attnserve.errors import UserError
from benchmarks import RESULTS, results
from benchmarks import options as opt
from benchmarks.checkpoints import check_room, config_of, variant_of

if TYPE_CHECKING:
    from benchmarks.servers import Answer, Server

CSV = RESULTS / "rates_cpu.csv"
BACKENDS = ("cpu_attn", "softmax", "softpick")
LENGTHS = (1024, 4096)

Batches = Annotated[list[int] | None, opt.count("Requests at once (default: 1 8).")]
Rounds = Annotated[int, opt.count("Decode rounds of each load.")]
PrefillRounds = Annotated[int, opt.count("Uncached rounds of each load.")]


@dataclass(frozen=True)
class RatesPlan:
    """What is sent to every server."""

    prompt_lens: Sequence[int]
    batches: Sequence[int]
    new_tokens: int
    rounds: int
    prefill_rounds: int
    seed: int

    def check(self, ckpt: Path) -> None:
        """Refuse now what would fail after minutes.

        Raises:
            UserError: with the reason in one line.
        """
        if self.new_tokens == 1:
            raise UserError("--new-tokens 1 has no decode step: give 2 or more")
        check_room(ckpt, self.length)

    @property
    def length(self) -> int:
        """Tokens of the longest prompt and its answer."""
        return max(self.prompt_lens) + self.new_tokens

    def columns(self) -> dict[str, int]:
        """Return those that all rows share."""
        names = ("new_tokens", "rounds", "prefill_rounds")
        return {name: getattr(self, name) for name in names}


@dataclass(frozen=True)
class Round:
    """What one batch of concurrent requests gave.

    Attributes:
        rate: tokens/s: of the prompts in an uncached round, of the answers in a decode round.
        ttft: median time to first token of the requests, in s.
        cached: share of the prompt tokens that came from the prefix cache.
    """

    rate: float
    ttft: float
    cached: float


@dataclass
class Load:
    """One prompt length and batch, and its rounds `[round][server]`."""

    prompt_len: int
    batch: int
    prefill: list[list[Round]] = field(default_factory=list)
    decode: list[list[Round]] = field(default_factory=list)


def rates(
    context: typer.Context,
    ckpt: opt.Ckpt,
    backends: Annotated[
        list[str] | None,
        opt.option(
            "Names; the others are compared with the first (default: the checkpoint's own, for "
            "softmax beside vLLM's; cpu_attn softmax softpick if its config.json names none)."
        ),
    ] = None,
    prompt_lens: Annotated[
        list[int] | None,
        opt.count("Tokens of a prompt (default: 1024 and 4096, as far as the model has room)."),
    ] = None,
    batches: Batches = None,
    new_tokens: opt.NewTokens = 64,
    rounds: Rounds = 5,
    prefill_rounds: PrefillRounds = 2,
    dtype: opt.ModelDtype = opt.Dtype.FLOAT32,
    threads: opt.Threads = opt.CORES,
    kv_cache_memory_bytes: opt.CacheBytes = 2 << 30,
    enforce_eager: opt.EnforceEager = False,
    seed: opt.Seed = 0,
    start_timeout: opt.StartTimeout = 1800,
    csv: opt.Csv = CSV,
    no_save: opt.NoSave = False,
    log_folder: opt.LogFolder = Path(".run"),
    as_json: AsJson = False,
) -> None:
    """Measure tokens per second and time to first token of `vllm serve`, by attention backend.

    There is one real server per backend. All are up at once and take turns, round by round, so that
    what changes the machine's speed meets all of them; whoever is not measured is stopped. Ratios
    are made inside a round, to the first backend. What follows `--` is passed on to `vllm serve`.

    A load (prompt length x batch) begins with uncached rounds: fresh prompts, one token each, for
    the prefill rate. The decode rounds after them send the last of those prompts again, so that
    they find their prefix in the cache and are short. (A stateful variant has no prefix cache: its
    decode rounds compute the prompt again, which takes longer but is not part of the decode rate.)

    In bfloat16, cpu_attn ends where AMX is not usable.
    """  # fmt: skip
    from benchmarks.servers import Server, ServerOptions, run, with_all

    variant = variant_of(ckpt)
    own = (variant.name,) if variant else BACKENDS
    chosen = backends or list(BACKENDS[:2] if own == ("softmax",) else own)
    room = config_of(ckpt)["max_position_embeddings"] - new_tokens
    lengths = prompt_lens or [n for n in LENGTHS if n <= room] or [max(1, room)]
    plan = RatesPlan(lengths, batches or [1, 8], new_tokens, rounds, prefill_rounds, seed)
    plan.check(ckpt)
    save = results.checked(csv, no_save)
    options = ServerOptions(dtype, kv_cache_memory_bytes, threads, enforce_eager, start_timeout,
                            log_folder, context.args)  # fmt: skip
    common = [f"--max-model-len={plan.length}", "--enable-prompt-tokens-details"]
    servers = [
        Server(name, ckpt, options, *common, f"--attention-backend={name}") for name in chosen
    ]
    found = run(with_all(servers, measure(servers, plan)), "python -m benchmarks.rates")
    rows = rows_of([server.name for server in servers], found)
    about = options.described(model=ckpt.resolve().name, **plan.columns())
    results.report(about, rows, table(rows), csv=save, as_json=as_json,
                   leave_out=["decode_ratios"])  # fmt: skip


def decode_rate(answers: Sequence[Answer]) -> float:
    """Return tokens/s while every request decodes: after the last first token, until one ends.

    Raises:
        LaunchError: there is no such time; the first request ended before the last one began.
    """
    from serving.launch.process import LaunchError

    begin = max(answer.tokens[0] for answer in answers)
    end = min(answer.tokens[-1] for answer in answers)
    tokens = sum(begin < at <= end for answer in answers for at in answer.tokens)
    if end <= begin or tokens == 0:
        raise LaunchError("the requests of a batch did not overlap; give more --new-tokens")
    return tokens / (end - begin)


def round_of(answers: Sequence[Answer], prompt_len: int) -> Round:
    """Return the figures of a round; one of a single token each is a prefill round."""
    total = prompt_len * len(answers)
    if len(answers[0].tokens) == 1:
        rate = total / (max(a.tokens[0] for a in answers) - min(a.sent for a in answers))
    else:
        rate = decode_rate(answers)
    ttft = median(answer.tokens[0] - answer.sent for answer in answers)
    return Round(rate, ttft, sum(answer.cached_tokens for answer in answers) / total)


async def measure(servers: Sequence[Server], plan: RatesPlan) -> list[Load]:
    """Measure every load, all servers in turn; the order is reversed every other round."""
    import numpy as np
    from tqdm import tqdm

    rng = np.random.default_rng(plan.seed)
    vocabulary = config_of(servers[0].ckpt)["vocab_size"]
    loads = [Load(length, batch) for length in plan.prompt_lens for batch in plan.batches]

    async def one_round(index: int, prompts: list[list[int]], n: int) -> list[Round]:
        order = list(range(len(servers)))[:: -1 if index % 2 else 1]
        found = {i: round_of(await servers[i].round(prompts, n), len(prompts[0])) for i in order}
        return [found[i] for i in range(len(servers))]

    for server in servers:  # its first prompt of some length takes three times as long as others
        await server.round([[1] * min(plan.prompt_lens)], 4)
    total = len(loads) * (plan.prefill_rounds + plan.rounds)
    with tqdm(total=total, unit="round", mininterval=5) as bar:
        for load in loads:
            bar.set_description(f"{load.prompt_len} x {load.batch}")
            for index in range(plan.prefill_rounds):
                prompts = rng.integers(1, vocabulary, (load.batch, load.prompt_len)).tolist()
                load.prefill.append(await one_round(index, prompts, 1))
                bar.update()
            for index in range(plan.rounds):
                load.decode.append(await one_round(index, prompts, plan.new_tokens))
                bar.update()
    return loads


def rows_of(names: Sequence[str], loads: Sequence[Load]) -> list[results.Row]:
    """Return one row per load and server; a ratio above 1 is faster than the first server."""
    rows = []
    for load in loads:
        for i, name in enumerate(names):
            row: results.Row = {"backend": name, "prompt_len": load.prompt_len, "batch": load.batch}
            for phase, rounds, ttft in (
                ("decode", load.decode, "ttft_cached_s"),
                ("prefill", load.prefill, "ttft_uncached_s"),
            ):
                mine = [r[i] for r in rounds]
                ratios = [r[i].rate / r[0].rate for r in rounds]
                row |= results.spread(f"{phase}_tokens_per_s", [r.rate for r in mine])
                row |= results.spread(f"{phase}_ratio", ratios)
                row |= results.spread(ttft, [r.ttft for r in mine])
                row[f"{phase}_cached"] = sum(r.cached for r in mine) / len(mine)
            row["decode_ratios"] = [round(r[i].rate / r[0].rate, 4) for r in load.decode]
            rows.append(row)
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return medians, and in brackets p20 to p80."""
    return results.table(
        {
            "backend": row["backend"],
            "prompt": row["prompt_len"],
            "batch": row["batch"],
            "decode tokens/s": results.shown(row, "decode_tokens_per_s", 1),
            "ratio": results.shown(row, "decode_ratio", 3),
            "prefill tokens/s": results.shown(row, "prefill_tokens_per_s", 0),
            "ratio ": results.shown(row, "prefill_ratio", 3),
            "TTFT cached s": f"{row['ttft_cached_s_median']:.3f}",
            "uncached s": f"{row['ttft_uncached_s_median']:.3f}",
            "cached": f"{row['decode_cached']:.0%}",
        }
        for row in rows
    )


if __name__ == "__main__":
    main(rates, "python -m benchmarks.rates", others=True)
