"""Compile the GPU kernels ahead of time; no GPU is needed.

Every variant's kernels are compiled, by the calls that a server makes, for GPUs that are not here;
beside softmax, softpick and ssmax, vLLM's own softmax kernel (`kernel_unified_attention`, launched
by vLLM's `unified_attention`), with the same tile and with the tile that vLLM takes. Nothing runs:
this shows that the kernels compile, and what they need. It says nothing about speed.

A row is a kernel: registers of a thread, spills (bytes of a thread), shared memory (bytes of a
program), and the instructions of the loop over keys: all, matrix products on tensor cores (mma),
multiply-adds in float32 (fma), exponentials and other special functions (special). Limits: no
spills in the loop and at most 24 bytes outside, shared memory that the chip has, and at most 1.1
times vLLM's registers at the same tile. What exceeds one, or does not compile, is listed below the
table, and the exit code is 1.

Rows are added to the CSV one call at a time. A kernel that it has already, with the same sources,
types, constants, options and Triton, is not compiled again.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attn_kernels import variant_names
from attnserve.options import command_line
from benchmarks import RESULTS
from benchmarks.triton_compile import ARCHS, DTYPES, HEAD_DIMS, PHASES

CSV = RESULTS / "triton_compile.csv"


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser, add = command_line("benchmarks.triton_compile", __doc__)
    variants = variant_names()
    several: dict[str, Any] = {"nargs": "+", "metavar": "X"}
    add("--archs", "GPUs, of " + ", ".join(ARCHS), choices=ARCHS, default=ARCHS, **several)
    add("--variants", "of " + ", ".join(variants), choices=variants, default=variants, **several)
    add("--head-dims", "of a head", type=int, choices=HEAD_DIMS, default=HEAD_DIMS, **several)
    add(
        "--dtypes",
        f"of queries and cache, of {', '.join(DTYPES)} (float8_e4m3fn cache, bfloat16 queries; "
        "sm_90 and sm_100 only)",
        choices=DTYPES,
        default=DTYPES,
        **several,
    )
    add("--phases", f"of {', '.join(PHASES)}", choices=PHASES, default=PHASES, **several)
    parser.add_argument(
        "--quick", action="store_true", help="sm_90, bfloat16 and head dim 128 alone, no CSV"
    )
    parser.add_argument("--no-vllm", action="store_true", help="leave vLLM's kernel out")
    add("--csv", "results are added to it; 'none': nowhere", default=str(CSV))
    options = parser.parse_args(arguments)
    if options.quick:
        options.archs, options.dtypes, options.head_dims = ["sm_90"], ["bfloat16"], [128]
    options.csv = None if options.quick or options.csv == "none" else Path(options.csv)
    return options


def main() -> int:
    """Command line: the table, what exceeds a limit, and as last line one JSON object."""
    options = parse()
    with tempfile.TemporaryDirectory(prefix="attnserve-triton-") as cache:
        # Before Triton and vLLM are imported. A cache of its own: everything is compiled, and a
        # user's cache stays as it is. Fused multiply-adds for vLLM's kernel as for ours.
        for name in ("TRITON_INTERPRET", "ATTNSERVE_TRITON_AUTOTUNE"):
            os.environ.pop(name, None)
        os.environ |= {"TRITON_CACHE_DIR": cache, "TRITON_DEFAULT_FP_FUSION": "1"}
        os.environ |= {"VLLM_PLUGINS": "", "VLLM_NO_USAGE_STATS": "1"}
        os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
        from benchmarks.triton_compile import matrix, report, run
        from benchmarks.triton_compile.dry import DryCompiler
        from benchmarks.triton_compile.peer import Vllm

        todo = [
            case
            for case in matrix.cases(
                options.archs, options.head_dims, options.dtypes, options.variants
            )
            if case.phase in options.phases
        ]
        try:
            known = run.known(run.read_csv(options.csv)) if options.csv is not None else {}
            compiler = DryCompiler(Path(cache), known)
            peer = None if options.no_vllm else Vllm()
            rows = run.run(run.Matrix(compiler, peer), todo, options.csv)
        except (OSError, ValueError) as error:
            sys.exit(f"benchmarks.triton_compile: {error}")
        print(report.table(rows))
        print(report.complaints(rows, colour=sys.stdout.isatty()))
        print(json.dumps({**run.about(), **report.summary(rows)}), flush=True)
    return 1 if any(row["error"] or row["violation"] for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
