"""The first hour on an NVIDIA GPU, in under eight minutes (`make gpu-check`).

matrix: every variant's kernels against the float64 law, in all dtypes, head sizes, groups, windows
and phases, on caches with NaN in every unused slot; float8 caches where the device has them.
graph: a captured decode step, replayed after block tables and lengths have changed in place.
packed: products and lookups with weights of 2 to 8 bits against float64 ones.
timing: each variant's kernels beside FlashAttention, vLLM's Triton kernel and FlexAttention, where
they are installed. serve: `vllm serve` of checkpoints/softpick with CUDA graphs on, its greedy
tokens against the law's.

Each part runs in processes of its own; a failure is a red row, and the others go on. Everything
goes into one file: commit it. The exit code is 1 if a row is red.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

try:
    import torch

    from attn_kernels import VariantError, get_variant, variant_names
    from attnserve import machine
    from attnserve.options import command_line, positive
    from benchmarks import RESULTS
    from benchmarks.gpu_check import report
    from benchmarks.gpu_check.checks import Task
    from benchmarks.gpu_check.run import GRACE_SECONDS, SHARES, STOP_SECONDS, run
    from benchmarks.kernels.case import DTYPES
except ImportError as error:  # the environment of `make install` is for CPUs
    sys.exit(
        f"gpu_check: {error}; in an environment with CUDA's torch: "
        "pip install -e '.[cuda,bench,dev]', then make gpu-check GPU_PYTHON=that/python"
    )

OUT = RESULTS / "gpu_check.json"
HEAD_DIMS = (128, 64, 256, 80)


def variant(text: str) -> str:
    """An argument that must name a variant."""
    try:
        return get_variant(text).name
    except VariantError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made, add = command_line("benchmarks.gpu_check", __doc__)
    add("--minutes", "time of the whole run; what is not made by then is skipped", type=float,
        default=8.0)  # fmt: skip
    add("--parts", "what to run", nargs="+", choices=list(SHARES), default=list(SHARES))
    add("--variants", "to check", nargs="+", type=variant, default=list(variant_names()))
    add("--dtypes", "of queries", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    add("--head-dims", "elements of a head", nargs="+", type=positive, default=list(HEAD_DIMS))
    add("--longest", "tokens of the longest request that is checked", type=positive, default=150)
    add("--workers", "processes that compile and check the matrix", type=positive,
        default=max(1, min(16, machine.cores() - 1)))  # fmt: skip
    add("--seed", "of the random inputs", type=int, default=0)
    add("--out", "results file, written anew", type=Path, default=OUT)
    add("--device", "cpu: in Triton's interpreter, float32 and float16 only (it multiplies "
        "bfloat16 wrongly)", choices=["cuda", "cpu"], default="cuda")  # fmt: skip
    made.add_argument(
        "--allow-no-gpu", action="store_true", help="exit with 0 where there is no CUDA device"
    )
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run, write the file, print the table and, last, one JSON object."""
    options = parser().parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        why = f"torch {torch.__version__} finds none; --device cpu runs a part of it interpreted"
        print(f"gpu_check: no CUDA device ({why})", file=sys.stderr)
        return 0 if options.allow_no_gpu else 1
    if not options.minutes > 0:
        print("gpu_check: --minutes must be above 0", file=sys.stderr)
        return 2
    if options.device == "cpu" and "bf16" in options.dtypes:
        print("gpu_check: leave bf16 out with --device cpu: --dtypes fp32 fp16", file=sys.stderr)
        return 2
    if options.longest < 12:
        print("gpu_check: --longest must be at least 12", file=sys.stderr)
        return 2
    parts = [part for part in SHARES if part in options.parts]
    about = report.described(options.device)
    about["options"] = {
        name: getattr(options, name)
        for name in ("minutes", "variants", "dtypes", "head_dims", "longest", "workers", "seed")
    }
    # The interpreter is chosen when kernels are imported, so in the workers only.
    environment = {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if options.device == "cuda":
        environment = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as folder:
        template = Task(
            part="",
            device=options.device,
            variants=tuple(options.variants),
            dtypes=tuple(options.dtypes),
            head_dims=tuple(options.head_dims),
            longest=options.longest,
            worker=0,
            workers=1,
            done=(),
            deadline=0.0,
            rows=Path(folder),
            seed=options.seed,
        )
        seconds = options.minutes * 60
        seconds -= min(seconds / 4, GRACE_SECONDS + STOP_SECONDS)  # for what ends late
        rows = run(parts, seconds, template, options.workers, Path(folder), environment)
    report.write(options.out, about, rows)
    print(report.table(rows))
    found = report.counted(rows)
    failed = sum(part["failed"] for part in found.values())
    print(f"\n{about['device']}: {options.out}")
    print(json.dumps({"failed": failed, "parts": found, "device": about["device"],
                      "commit": about["commit"], "out": str(options.out)}))  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
