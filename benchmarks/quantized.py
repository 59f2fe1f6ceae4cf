"""What packed weights save: tokens per second and memory of `vllm serve`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from attnserve.command import AsJson, main
from benchmarks import RESULTS, results
from benchmarks import options as opt
from benchmarks.checkpoints import packed_name, weight_bytes
from benchmarks.rates import Load, PrefillRounds, RatesPlan, Rounds, measure
from benchmarks.rates import rows_of as rows_of_rates

if TYPE_CHECKING:
    from benchmarks.servers import Server

CSV = RESULTS / "quantized_cpu.csv"


@dataclass(frozen=True)
class Weights:
    """A server's weights: their name, the dtype of activations, and bytes in memory."""

    name: str
    activations: str
    size: int


def quantized(
    context: typer.Context,
    ckpt: opt.Ckpt,
    packed: Annotated[list[Path], opt.folder("Folders that quant.quantize has written from it.")],
    packed_dtypes: Annotated[
        list[opt.Dtype] | None, opt.option("Activations of packed checkpoints (default: float32).")
    ] = None,
    peer_backend: Annotated[
        str,
        opt.option(
            "Attention backend of all servers (default: stock vLLM's own for the unquantized ones)."
        ),
    ] = "",
    prompt_lens: Annotated[
        list[int] | None, opt.count("Of a prompt, in tokens (default: 128).")
    ] = None,
    batches: Annotated[list[int] | None, opt.count("Requests at once (default: 1).")] = None,
    new_tokens: opt.NewTokens = 64,
    rounds: Rounds = 7,
    prefill_rounds: PrefillRounds = 3,
    threads: opt.Threads = opt.CORES,
    kv_cache_memory_bytes: opt.CacheBytes = 256 << 20,
    enforce_eager: opt.EnforceEager = False,
    seed: opt.Seed = 0,
    start_timeout: opt.StartTimeout = 1800,
    csv: opt.Csv = CSV,
    no_save: opt.NoSave = False,
    log_folder: opt.LogFolder = Path(".run"),
    as_json: AsJson = False,
) -> None:
    """Measure what packed weights save: tokens per second and memory of `vllm serve`.

    They are compared with the same checkpoint unquantized, in float32 and in bfloat16, in stock
    vLLM (without this project's plugins).

        python -m quant.quantize CKPT w4 --bits 4 --scheme gptq --embeddings 8
        python -m benchmarks.quantized --ckpt CKPT --packed w4

    All servers are up at once and take turns; ratios are made inside a round (benchmarks.rates).
    In bfloat16, stock vLLM 0.32 can die on processors with AMX (README): --peer-backend softmax
    runs this project's attention kernel in all servers instead, and then nothing but the weights
    differs. What follows `--` is passed on to `vllm serve`.
    """  # fmt: skip
    from benchmarks.servers import Server, ServerOptions, run, with_all

    plan = RatesPlan(prompt_lens or [128], batches or [1], new_tokens, rounds, prefill_rounds, seed)
    plan.check(ckpt)
    save = results.checked(csv, no_save)
    options = ServerOptions("float32", kv_cache_memory_bytes, threads, enforce_eager,
                            start_timeout, log_folder, context.args)  # fmt: skip
    common = [f"--max-model-len={plan.length}", "--enable-prompt-tokens-details"]
    common += [f"--attention-backend={peer_backend}"] * bool(peer_backend)
    each = [(ckpt, dtype, dtype) for dtype in ("float32", "bfloat16")]
    for dtype in packed_dtypes or [opt.Dtype.FLOAT32]:
        each += [(path, packed_name(path), dtype.value) for path in packed]
    weights, servers = [], []
    for path, name, kind in each:
        weights.append(Weights(name, kind, weight_bytes(path, kind)))
        servers.append(Server(name, path, replace(options, dtype=kind), *common))
        if path == ckpt and not peer_backend:
            servers[-1].environment["VLLM_PLUGINS"] = ""
    loads, sizes = run(
        with_all(servers, measure_both(servers, plan)), "python -m benchmarks.quantized"
    )
    rows = rows_of(weights, loads, sizes)
    about = options.described(model=ckpt.resolve().name, **plan.columns())
    about |= {"peer_backend": peer_backend}
    del about["dtype"]
    results.report(about, rows, table(rows), csv=save, as_json=as_json,
                   leave_out=["decode_ratios"])  # fmt: skip


async def measure_both(servers: Sequence[Server], plan: RatesPlan) -> tuple[list[Load], list[int]]:
    """Return the loads, and afterwards the bytes that only one server's processes have in
    memory."""
    from benchmarks.watch import processes

    loads = await measure(servers, plan)
    return loads, [sum(p.memory_full_info().uss for p in processes(each)) for each in servers]


def rows_of(
    weights: Sequence[Weights], loads: Sequence[Load], resident: Sequence[int]
) -> list[results.Row]:
    """Return one row a load and server. `decode_ratio` is to the first server, in float32, and
    `decode_ratio_2` to the second, in bfloat16."""
    from statistics import median

    rows = rows_of_rates([each.name for each in weights], loads)
    for i, row in enumerate(rows):
        load, index = loads[i // len(weights)], i % len(weights)
        mine, second = weights[index], weights[1].size
        ratio = median(r[index].rate / r[1].rate for r in load.decode)
        row |= {"weights": row.pop("backend"), "activations": mine.activations}
        row |= {"decode_ratio_2_median": float(f"{ratio:.6g}"), "weight_bytes": mine.size}
        row["weight_ratio_2"] = float(f"{mine.size / second:.6g}")
        row["resident_bytes"] = resident[index]
    return rows


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Return medians, and in brackets p20 to p80."""
    return results.table(
        {
            "weights": row["weights"],
            "activations": row["activations"],
            "prompt": row["prompt_len"],
            "batch": row["batch"],
            "decode tokens/s": results.shown(row, "decode_tokens_per_s", 1),
            "x float32": results.shown(row, "decode_ratio", 2),
            "x bfloat16": f"{row['decode_ratio_2_median']:.2f}",
            "prefill tokens/s": f"{row['prefill_tokens_per_s_median']:.0f}",
            "weights MB": f"{row['weight_bytes'] / 1e6:.1f}",
            "of bfloat16's": f"{row['weight_ratio_2']:.3f}",
            "resident MB": f"{row['resident_bytes'] / 1e6:.0f}",
        }
        for row in rows
    )


if __name__ == "__main__":
    main(quantized, "python -m benchmarks.quantized", others=True)
