"""The standard set of benchmarks: `python -m benchmarks`."""

from __future__ import annotations

import json
import sys
import time
from enum import StrEnum
from pathlib import Path
from typing import Annotated

from attnserve.command import AsJson, main
from attnserve.files import CHECKOUT
from attnserve.programs import run
from benchmarks import RESULTS
from benchmarks import options as opt

CHECKPOINTS = CHECKOUT / "checkpoints"
PACKED = Path(".run/softpick-w4")
PACK = [
    *("quant.quantize", f"{CHECKPOINTS / 'softpick'}", f"{PACKED}", "--overwrite"),
    *("--bits=4", "--scheme=rtn", "--embeddings=8"),
]
"""Speed and memory do not depend on the scheme; round to nearest takes no time."""


Benchmark = StrEnum("Benchmark", ["KERNELS", "MEMORY", "SERVE", "PRUNING", "GATEWAY"])
STANDARD = {
    Benchmark.KERNELS: ["benchmarks.kernels", "--quick"],
    Benchmark.MEMORY: ["benchmarks.memory", "--enforce-eager", f"--packed={PACKED}"],
    Benchmark.SERVE: [
        *("benchmarks.serve", "--enforce-eager", f"--packed={PACKED}"),
        *("--request-rates", "8", "inf"),
    ],
    Benchmark.PRUNING: [
        *("benchmarks.serve", "--enforce-eager", f"--ckpts={CHECKPOINTS / 'selective'}"),
        *("--no-stock", "--gateway=none", "--request-rates=inf", "--running"),
        *("--kv-cache-memory-bytes=8M", "--requests=64", "--new-tokens=128"),
        f"--csv={RESULTS / 'serve_pruned_cpu.csv'}",
    ],
    Benchmark.GATEWAY: ["benchmarks.gateway", "--rounds=3"],
}


def benchmarks(
    only: Annotated[list[Benchmark] | None, opt.option("Which of them (default: all).")] = None,
    no_save: opt.NoSave = False,
    as_json: AsJson = False,
) -> int:
    """Run the standard set, one benchmark after another (`make bench`).

    On the bundled checkpoints, with models that are not compiled (vLLM's --enforce-eager), in under
    40 minutes on two cores. Nothing else should run on the machine. Each benchmark adds to its own
    file in benchmarks/results; one that fails does not stop the others. `--help` of each says what
    it measures:

      kernels   benchmarks.kernels --quick
      memory    benchmarks.memory; with softpick in 4 bits too, which quant.quantize writes first
      serve     benchmarks.serve, the same servers, at 8 requests/s and all at once
      pruning   benchmarks.serve, selective within budgets and not, 64 requests in 8 MiB of cache
      gateway   benchmarks.gateway, 3 rounds

    Others, each alone: benchmarks.packed_products, benchmarks.smollm2, benchmarks.triton_compile,
    benchmarks.gpu, benchmarks.gpu_serving, benchmarks.gpu_check.
    """
    from attnserve import machine
    from benchmarks import results

    commands = {part.value: STANDARD[part] + ["--no-save"] * no_save for part in only or Benchmark}
    if any(f"--packed={PACKED}" in command for command in commands.values()):
        commands = {"pack": PACK, **commands}
    rows: list[results.Row] = []
    for name, arguments in commands.items():
        command = [sys.executable, "-m", *arguments]
        print(f"\n=== {' '.join(command[1:])}", file=sys.stderr, flush=True)
        began = time.monotonic()
        code = run(command, sys.stderr if as_json else sys.stdout)
        rows.append({"benchmark": name, "s": round(time.monotonic() - began), "exit code": code})
    found = {**machine.described(), "rows": rows}
    print(json.dumps(found) if as_json else f"\n{results.table(rows)}")
    return int(any(row["exit code"] for row in rows))


if __name__ == "__main__":
    main(benchmarks, "python -m benchmarks")
