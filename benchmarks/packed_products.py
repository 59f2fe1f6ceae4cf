"""The linear products of one decode step: packed weights against torch's in float32 and bfloat16.

Shapes are SmolLM2-135M's: 30 layers, and a head of 49152 rows in 8 bits. Each layer has weights of
its own, so that they come from memory as in a model. All peers take turns; ratios are made inside a
round.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor
from torch.nn.functional import linear

from attnserve import machine
from attnserve.options import command_line, positive
from benchmarks import RESULTS
from benchmarks.servers import append_csv
from quant_kernels import multiply, panels
from quant_kernels.pack import pack

CSV = RESULTS / "packed_products_cpu.csv"
LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 30, 576, 1536, 49152
SHAPES = ((960, HIDDEN), (HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
"""Outputs and inputs of a layer's matrices: QKV, attention's output, gate and up, down."""
HEAD = (VOCABULARY, HIDDEN)
HEAD_BITS, GROUP = 8, 64

Product = Callable[[Tensor], Tensor]


def dense(shape: tuple[int, int], dtype: torch.dtype) -> Product:
    """torch's product with a random matrix."""
    weight = torch.randn(shape).to(dtype)
    return lambda x: linear(x, weight)


def packed(shape: tuple[int, int], bits: int) -> Product:
    """Ours, asymmetric."""
    groups = (shape[0], shape[1] // GROUP)
    values = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, groups, dtype=torch.uint8)
    scales = torch.rand(groups).bfloat16()
    shape_of = {"bits": bits, "group_size": GROUP, "inputs": shape[1]}
    weight = panels(pack(values, bits), scales, zeros, **shape_of)
    return lambda x: multiply(x, weight)


def step(
    make: Callable[[tuple[int, int], bool], Product], x: dict[int, Tensor]
) -> Callable[[], None]:
    """All products of one step.

    Args:
        make: a product of a shape; True for the head.
        x: inputs by width.
    """
    shapes = [shape for _ in range(LAYERS) for shape in SHAPES]
    products = [(make(shape, False), x[shape[1]]) for shape in shapes]
    products.append((make(HEAD, True), x[HEAD[1]]))

    def run() -> None:
        for product, inputs in products:
            product(inputs)

    return run


def peers(bits: Sequence[int], rows: int) -> dict[str, Callable[[], None]]:
    """The steps by name; packed ones have float32 inputs."""
    x = {width: torch.randn(rows, width) for width in (HIDDEN, INTERMEDIATE)}
    rounded = {width: inputs.bfloat16() for width, inputs in x.items()}
    found = {
        "float32": step(lambda shape, head: dense(shape, torch.float32), x),
        "bfloat16": step(lambda shape, head: dense(shape, torch.bfloat16), rounded),
    }
    for width in bits:

        def make(shape: tuple[int, int], head: bool, width: int = width) -> Product:
            return packed(shape, HEAD_BITS if head else width)

        found[f"w{width}"] = step(make, x)
    return found


def measure(steps: dict[str, Callable[[], None]], rounds: int) -> dict[str, list[float]]:
    """Seconds of each round; the order is reversed every other one."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for run in steps.values():
        run()
    for index in range(rounds):
        for name in list(steps)[:: -1 if index % 2 else 1]:
            start = time.perf_counter()
            steps[name]()
            times[name].append(time.perf_counter() - start)
    return times


def rows_of(times: dict[str, list[float]]) -> list[dict[str, Any]]:
    """One row a peer: milliseconds, and how many times faster than torch."""
    rows = []
    for name, mine in times.items():
        row: dict[str, Any] = {"weights": name, "ms_median": 1e3 * float(np.median(mine))}
        for peer in ("float32", "bfloat16"):
            ratios = np.divide(times[peer], mine)
            for quantile, label in ((20, "p20"), (50, "median"), (80, "p80")):
                row[f"x_{peer}_{label}"] = float(np.percentile(ratios, quantile))
        rows.append({key: v if isinstance(v, str) else float(f"{v:.4g}") for key, v in row.items()})
    return rows


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The command line."""
    parser, add = command_line("benchmarks.packed_products", __doc__)
    add("--bits", "widths", nargs="+", type=int, choices=range(2, 9), default=[2, 3, 4, 8])
    add("--rows", "requests that decode together", type=positive, default=1)
    add("--rounds", "of all peers", type=positive, default=15)
    add("--threads", "of all peers", type=positive, default=machine.cores())
    add("--csv", "rows are added to it", type=Path, default=CSV)
    parser.add_argument("--no-save", action="store_true", help="write no CSV")
    return parser.parse_args(arguments)


def main() -> None:
    """Command line: the table, and as last line one JSON object."""
    options = parse()
    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    rows = rows_of(measure(peers(options.bits, options.rows), options.rounds))
    about = {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": machine.cpu_model(),
        "cores": machine.cores(),
        "threads": options.threads,
        "torch": machine.package("torch"),
        "commit": machine.commit(),
        "rows": options.rows,
        "rounds": options.rounds,
    }
    if not options.no_save:
        append_csv(options.csv, about, rows)
    print(pd.DataFrame(rows).to_string(index=False))
    print(json.dumps({**about, "steps": rows}))


if __name__ == "__main__":
    main()
