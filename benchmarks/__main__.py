"""Run the standard set, one benchmark after another (`make bench`).

On the bundled checkpoints, with models that are not compiled (vLLM's --enforce-eager), in under 40
minutes on two cores. Nothing else should run on the machine. Each benchmark adds to its own file in
benchmarks/results; one that fails does not stop the others. `--help` of each says what it measures:

  kernels   benchmarks.kernels --quick
  memory    benchmarks.memory; with softpick in 4 bits too, which quant.quantize writes first
  serve     benchmarks.serve, the same servers, at 8 requests/s and all at once
  pruning   benchmarks.pruning, 64 requests in 8 MiB of KV cache
  gateway   benchmarks.gateway, 3 rounds
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pandas as pd

from attnserve import machine
from attnserve.commands import command_list
from attnserve.files import CHECKOUT
from attnserve.options import command_line

COMMANDS = (
    "benchmarks.kernels",
    "benchmarks.serve",
    "benchmarks.memory",
    "benchmarks.rates",
    "benchmarks.pruning",
    "benchmarks.quantized",
    "benchmarks.packed_products",
    "benchmarks.gateway",
    "benchmarks.smollm2",
    "benchmarks.triton_compile",
    "benchmarks.gpu",
)
CHECKPOINTS = CHECKOUT / "checkpoints"
PACKED = Path(".run/softpick-w4")
PACK = [
    *("quant.quantize", f"{CHECKPOINTS / 'softpick'}", f"{PACKED}", "--overwrite"),
    *("--bits=4", "--scheme=rtn", "--embeddings=8"),
]
"""Speed and memory do not depend on the scheme; round to nearest takes no time."""

STANDARD = {
    "kernels": ["benchmarks.kernels", "--quick"],
    "memory": ["benchmarks.memory", "--enforce-eager", f"--packed={PACKED}"],
    "serve": [
        *("benchmarks.serve", "--enforce-eager", f"--packed={PACKED}"),
        *("--request-rates", "8", "inf"),
    ],
    "pruning": [
        *("benchmarks.pruning", f"--ckpt={CHECKPOINTS / 'selective'}"),
        *("--kv-budgets", "8", "8", "12", "16", f"--kv-cache-memory-bytes={8 << 20}"),
        *("--requests=64", "--prompt-len=128", "--new-tokens=128", "--rounds=3"),
    ],
    "gateway": ["benchmarks.gateway", "--rounds=3"],
}


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser, add = command_line("benchmarks", __doc__)
    parser.epilog = f"Each benchmark alone, with --help:\n\n{command_list(COMMANDS)}"
    add("--only", "which of them", nargs="+", choices=STANDARD, default=list(STANDARD))
    parser.add_argument("--no-save", action="store_true", help="write no results")
    return parser.parse_args(arguments)


def run(command: Sequence[str]) -> int:
    """A command's exit code. Ctrl-C is passed on: the command ends its servers itself."""
    process = subprocess.Popen(command, start_new_session=True)
    try:
        return process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise


def main() -> None:
    """Command line: what each prints, then a table, and as last line one JSON object."""
    options = parse()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    rows = []
    interrupted = False
    commands = {
        name: [*STANDARD[name], *(["--no-save"] * options.no_save)] for name in options.only
    }
    if any(f"--packed={PACKED}" in command for command in commands.values()):
        commands = {"pack": PACK, **commands}
    for name, arguments in commands.items():
        command = [sys.executable, "-m", *arguments]
        print(f"\n=== {' '.join(command[1:])}", flush=True)
        began = time.monotonic()
        try:
            code = run(command)
        except KeyboardInterrupt:
            interrupted = True
            break
        rows.append({"benchmark": name, "s": round(time.monotonic() - began), "exit code": code})
    print()
    print(pd.DataFrame(rows).to_string(index=False) if rows else "nothing was measured")
    print(json.dumps({**machine.described(), "interrupted": interrupted, "rows": rows}))
    sys.exit(130 if interrupted else max((row["exit code"] != 0 for row in rows), default=0))


if __name__ == "__main__":
    main()
