"""Compile the GPU kernels for packed weights ahead of time; no GPU is needed.

    python -m benchmarks.triton_compile.packed

A row is a kernel, launched as a server launches it for so many rows of x (0: a lookup), with a zero
point in each group of 64 columns. Nothing runs: this shows that the kernels compile, and what they
need: registers of a thread, spills (bytes of a thread), shared memory (bytes of a program), and the
instructions of the loop over columns: all, matrix products on tensor cores (matrix), multiply-adds
in float32 (fma). It says nothing about speed. Limits: no spills in the loop and at most 24 bytes
outside, and shared memory that the chip has; what exceeds one, or does not compile, is marked, and
the exit code is 1.

A kernel that the CSV has, with the same sources, types, constants, options and Triton, is not
compiled again.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from attnserve.options import command_line
from benchmarks import RESULTS
from benchmarks.triton_compile import ARCHS
from quant_kernels.weight import BITS

CSV = RESULTS / "triton_compile_packed.csv"
DTYPES = ("bfloat16", "float16", "float32")
ROWS = (1, 4, 16, 64)
"""Of x: a kernel for each, and one for lookups."""
LOOKUP = 0
OUTPUTS, INPUTS, GROUP = 4096, 2048, 64


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser, add = command_line("benchmarks.triton_compile.packed", __doc__)
    several: dict[str, Any] = {"nargs": "+", "metavar": "X"}
    add("--archs", "GPUs, of " + ", ".join(ARCHS), choices=ARCHS, default=ARCHS, **several)
    add("--bits", "of a code, 2 to 8", type=int, choices=BITS, default=BITS, **several)
    add("--dtypes", "of x, of " + ", ".join(DTYPES), choices=DTYPES, default=DTYPES, **several)
    rows = (*ROWS, LOOKUP)
    add("--rows", "of x, of 1, 4, 16, 64; 0: a lookup", type=int, choices=rows, default=rows,
        **several)  # fmt: skip
    add("--csv", "results are added to it; 'none': nowhere", default=str(CSV))
    options = parser.parse_args(arguments)
    options.csv = None if options.csv == "none" else Path(options.csv)
    return options


def main(arguments: Sequence[str] | None = None) -> int:
    """Command line: the table and, as last line, one JSON object."""
    options = parse(arguments)
    with tempfile.TemporaryDirectory(prefix="attnserve-triton-") as cache:
        # Before Triton is imported. A cache of its own: everything is compiled.
        os.environ.pop("TRITON_INTERPRET", None)
        os.environ["TRITON_CACHE_DIR"] = cache
        import pandas as pd
        from tqdm import tqdm

        from benchmarks.triton_compile import run
        from benchmarks.triton_compile.dry import DryCompiler
        from benchmarks.triton_compile.listing import Figures

        kept: list[dict[str, Any]] = []
        if options.csv is not None and options.csv.exists():
            kept = pd.read_csv(options.csv, dtype={"code": str}).to_dict("records")
            if not kept or "bits" not in kept[0]:
                sys.exit(f"{options.csv} has other columns; move it away or name another --csv")
        names = [field.name for field in dataclasses.fields(Figures)]
        known = {row["code"]: Figures(**{name: int(row[name]) for name in names}) for row in kept}
        compiler = DryCompiler(Path(cache), dict(known))
        about = run.about()
        cases = list(itertools.product(options.archs, options.dtypes, options.bits, options.rows))
        rows: list[dict[str, Any]] = []
        for arch, dtype, bits, count in tqdm(cases, unit="kernel", disable=None):
            case = {"arch": arch, "dtype": dtype, "bits": bits, "rows": count}
            row = {**about, **case, "kernel": "", "num_warps": 0, "num_stages": 0}
            row |= {**dict.fromkeys(names, 0), "code": "", "violation": "", "error": ""}
            rows.append(row)
            try:
                with compiler.target(arch) as found:
                    launch(dtype, bits, count)
            except Exception as error:  # the compiler raises all kinds; the other cases go on
                row["error"] = run.reason(error)
                continue
            (compiled,) = found
            row |= {name: getattr(compiled, name) for name in ("code", "num_warps", "num_stages")}
            row |= dataclasses.asdict(compiled.figures)
            row |= {"kernel": run.launch_name(compiled), "violation": run.violations(row)}
            if options.csv is not None and row["code"] not in known:
                line = pd.DataFrame([row])
                line.to_csv(options.csv, mode="a", header=not options.csv.exists(), index=False)
    frame = pd.DataFrame(rows)
    print(frame.drop(columns=[*about, "code", "loop_special"]).to_string(index=False))
    wrong = frame[(frame["error"] != "") | (frame["violation"] != "")]
    print(json.dumps({**about, "kernels": len(rows), "wrong": len(wrong)}), flush=True)
    return 1 if len(wrong) else 0


def launch(dtype: str, bits: int, rows: int) -> None:
    """What a server launches, with tensors that are never read."""
    import torch

    from quant_kernels import Panels, triton

    kind = getattr(torch, dtype)
    scales = torch.empty(OUTPUTS // 16, INPUTS // GROUP, 16, dtype=torch.bfloat16)
    words = torch.empty(OUTPUTS // 16, INPUTS * bits // 32, 16, dtype=torch.int32)
    shape = (bits, GROUP, OUTPUTS, INPUTS)
    weight = Panels(words, scales, scales.to(torch.uint8), *shape)
    if rows == LOOKUP:
        ids = torch.zeros(3, dtype=torch.int64)
        triton.gather(ids, weight, kind)
    else:
        triton.multiply(torch.empty(rows, INPUTS, dtype=kind), weight)


if __name__ == "__main__":
    sys.exit(main())
