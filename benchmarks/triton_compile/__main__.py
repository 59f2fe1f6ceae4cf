"""Compile the GPU kernels ahead of time: `python -m benchmarks.triton_compile`."""

from __future__ import annotations

import functools
import os
import re
import tempfile
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from attnserve import machine
from attnserve.command import AsJson, main
from attnserve.errors import UserError
from benchmarks import RESULTS, results
from benchmarks import options as opt

if TYPE_CHECKING:
    from benchmarks.triton_compile.calls import Case, Pair
    from benchmarks.triton_compile.dry import Compiled, DryCompiler

SPILLS = 24
"""Most bytes of a thread: ptxas spills a few registers once a program, for some kernels even where
it has registers left (docs/LOG.md)."""

QUICK = "sm_90 128 bfloat16"


def triton_compile(
    quick: Annotated[bool, opt.option(f"Only {QUICK}, and no CSV.", "--quick")] = False,
    packed: Annotated[
        bool, opt.option("Products and lookups with packed weights, not attention.", "--packed")
    ] = False,
    training: Annotated[
        bool, opt.option("The kernels of training, forward and backward, not those of serving.")
    ] = False,
    host: Annotated[
        bool,
        opt.option(
            f"The host's time of a call, of {QUICK} or what --match says; no CSV.", "--host"
        ),
    ] = False,
    match: Annotated[
        str,
        opt.option(
            "Only cases whose name has this regular expression: 'sm_90 64 .* softpick decode$' "
            "(then 64 or 128, of a cache with such pages and not with 16), or with --packed "
            "'sm_90 bfloat16 4 1$' (bits, rows; 0: a lookup; then two-level, of such scales)."
        ),
    ] = "",
    csv: Annotated[
        Path | None, opt.folder("Rows are added to it (default: a file in benchmarks/results).")
    ] = None,
    no_save: opt.NoSave = False,
    as_json: AsJson = False,
) -> int:
    """Compile the GPU kernels ahead of time; no GPU is needed.

    Every kernel is compiled by the call that a server makes, for GPUs that are not here; beside
    softmax, softpick and ssmax, vLLM's own softmax kernel (`kernel_unified_attention`), with the
    same tile. Nothing runs: this shows that the kernels compile, and what they need. It says
    nothing about speed.

    A row is a kernel: registers of a thread, spills (bytes of a thread) and shared memory (bytes of
    a program). Limits: 24 bytes of spills (of the kernel in Gluon, prefill-gluon: 96), the shared
    memory that the chip has, and matrix products that overlap (below). A kernel that exceeds one,
    or does not compile, is marked, and the exit code is 1.

    A row has what a warp issues in one turn of the innermost loop with matrix products on tensor
    cores (loop_instructions), that by the scores of a thread in a tile, rows x keys / threads
    (per_score), and of these the special functions: exponentials, logarithms, reciprocals
    (special). Of several loops with as many products, as one with masks and one
    without, the shortest counts; loops with other numbers of products are joined by "+": lssar's
    statistics and its output. serialised: ptxas made Hopper's products wait for one another.

    --host times calls of a layer whose kernels are compiled, on this machine's CPU: what Python
    takes for a layer's attention (cases decode-split: contexts in parts, decode, prefill) or for
    writing the cache, without what Triton's launcher in C and the GPU's driver add.
    """  # fmt: skip
    if packed + training + host > 1:
        raise UserError("--packed, --training and --host are three tables: give one of them")
    try:  # without large pages, if nothing is said
        wanted = re.compile(match or (rf"{QUICK}( \S+){{1,2}}$" if quick or host else ""))
    except re.error as error:
        raise UserError(f"--match {match!r} is no regular expression: {error}") from None
    name = f"triton_compile{'_packed' * packed}{'_training' * training}.csv"
    path = csv or RESULTS / name
    save = results.checked(path, no_save or quick or host)
    about = {"date": datetime.now(UTC).isoformat(timespec="seconds"), "commit": machine.commit()}
    about |= {name: machine.package(name) for name in ("triton", "vllm")}
    with tempfile.TemporaryDirectory(prefix="attnserve-triton-") as cache:
        # Before Triton and vLLM are imported. A cache of its own: everything is compiled, and a
        # user's cache stays as it is. Fused multiply-adds for vLLM's kernel as for ours.
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "1"}
        os.environ["ATTNSERVE_TRITON_CONFIGS"] = cache  # a user's own tables change no figures
        os.environ |= {"VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1"}
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from benchmarks.triton_compile import calls
        from benchmarks.triton_compile.dry import DryCompiler

        compile_one: Callable[[DryCompiler, Case], list[Pair]] = calls.compile_packed
        cases = calls.packed_cases()
        if training:
            cases, compile_one = calls.training_cases(), calls.compile_training
        elif not packed:
            cases = calls.attention_cases()
        todo = [case for case in cases if wanted.search(" ".join(map(str, case.values())))]
        if not todo:
            raise UserError(f"--match {match!r} is in no case's name")
        if host:
            return report_host_times(DryCompiler(Path(cache), keep=True), todo, as_json=as_json)
        if not packed and not training:
            compile_one = functools.partial(calls.compile_attention, peer=calls.Vllm())
        rows = compile_all(DryCompiler(Path(cache)), todo, compile_one)
    if save is not None:
        results.append_csv(save, about, rows)
    wrong = [row for row in rows if row["error"] or row["violation"]]
    counts = {"kernels": len(rows), "wrong": len(wrong)}
    results.report({**about, **counts}, rows, results.table(rows), csv=None, as_json=as_json)
    return 1 if wrong else 0


def report_host_times(compiler: DryCompiler, todo: Sequence[Case], *, as_json: bool) -> int:
    """Print the host's time of each case's call in microseconds."""
    from benchmarks.triton_compile.calls import host_time

    rows = [{**case, "host_us": round(1e6 * host_time(compiler, case), 1)} for case in todo]
    results.report(machine.described(), rows, results.table(rows), csv=None, as_json=as_json)
    return 0


def compile_all(
    compiler: DryCompiler,
    todo: Sequence[Case],
    compile_one: Callable[[DryCompiler, Case], list[Pair]],
) -> list[results.Row]:
    """Return the rows of all cases."""
    from tqdm import tqdm

    rows: list[results.Row] = []
    progress = tqdm(todo, unit="call", disable=None)
    for case in progress:
        progress.set_postfix_str(" ".join(map(str, case.values())))
        try:
            rows += [row_of(case, *pair) for pair in compile_one(compiler, case)]
        except Exception as error:  # a compiler raises all kinds; the other cases go on
            rows.append(row_of(case) | {"error": reason(error)})
    return rows


def row_of(
    case: Case, kernel: Compiled | None = None, theirs: Compiled | None = None
) -> results.Row:
    """Return a kernel's row; `theirs` is vLLM's with the same tile."""
    constants = {} if kernel is None else kernel.constants
    row = {**case, "kernel": "" if kernel is None else kernel.name.removesuffix("_kernel")}
    if "head_dim" in case:
        if "phase" in case:
            row["block_size"] = constants.get("BLOCK_SIZE", case.get("block_size"))
        row |= {"rows": constants.get("ROWS"), "keys": constants.get("KEYS")}
    for name in ("num_warps", "num_stages", "registers", "spills", "shared"):
        row[name] = getattr(kernel, name, None)
    if "head_dim" in case:
        row |= loop_figures(kernel)
        for name in ("registers", "spills", "shared"):
            row[f"vllm_{name}"] = getattr(theirs, name, None)
        row["registers_to_vllm"] = None
        if kernel is not None and theirs is not None:
            row["registers_to_vllm"] = round(kernel.registers / theirs.registers, 3)
    return row | {"violation": violations(row), "error": ""}


def loop_figures(kernel: Compiled | None) -> results.Row:
    """Return the columns of a kernel's loops, joined by "+" where it has several: their
    instructions, and these and special functions by each score of a thread."""
    row: results.Row = dict.fromkeys(("loop_instructions", "per_score", "special", "serialised"))
    if kernel is not None and kernel.loops:
        row["loop_instructions"] = "+".join(str(loop.instructions) for loop in kernel.loops)
        row["serialised"] = kernel.serialised
        scores = kernel.scores
        if scores is not None:
            each = [(loop.instructions / scores, loop.special / scores) for loop in kernel.loops]
            row["per_score"] = "+".join(f"{instructions:.1f}" for instructions, _ in each)
            row["special"] = "+".join(f"{special:.2f}" for _, special in each)
    return row


def violations(row: results.Row) -> str:
    """Return what a row exceeds, in words; empty: nothing."""
    from attn_kernels.triton.tuning import GLUON_SPILLS, SHARED_MEMORY

    limit = SHARED_MEMORY[row["arch"]]
    found = []
    if (row["spills"] or 0) > (GLUON_SPILLS if row.get("kernel") == "prefill" else SPILLS):
        found.append(f"spills {row['spills']} B")
    if (row["shared"] or 0) > limit:
        found.append(f"shared memory {row['shared']} B of {limit}")
    if row.get("serialised"):
        found.append("products are serialised")
    return "; ".join(found)


def reason(error: BaseException) -> str:
    """Return the compiler's line: of the innermost error, which says what is wrong."""
    while error.__cause__ is not None:
        error = error.__cause__
    # Triton's errors first quote the place in the source, which is many lines.
    lines = [line.strip() for line in str(error).splitlines() if line.strip(" ^\t")]
    return f"{type(error).__name__}: {lines[-1] if lines else 'no message'}"[:300]


if __name__ == "__main__":
    main(triton_compile, "python -m benchmarks.triton_compile")
