"""The linear products of one decode step: packed weights beside torch's."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from typing import TYPE_CHECKING, Annotated

import numpy as np

from attnserve import machine
from attnserve.command import AsJson, main
from benchmarks import RESULTS, results
from benchmarks import options as opt

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    Product = Callable[[Tensor], Tensor]
    Step = list[Callable[[], Tensor]]

CSV = RESULTS / "packed_products_cpu.csv"
LAYERS, HIDDEN, INTERMEDIATE, VOCABULARY = 30, 576, 1536, 49152
SHAPES = ((960, HIDDEN), (HIDDEN, HIDDEN), (2 * INTERMEDIATE, HIDDEN), (HIDDEN, INTERMEDIATE))
"""Outputs and inputs of a layer's matrices: QKV, attention's output, gate and up, down."""
HEAD = (VOCABULARY, HIDDEN)
HEAD_BITS, GROUP_SIZE = 8, 64


def packed_products(
    bits: Annotated[
        list[int] | None, opt.option("Bits of a weight (default: 2 3 4 8).", min=2, max=8)
    ] = None,
    rows: Annotated[int, opt.count("Requests that decode together.")] = 1,
    rounds: Annotated[int, opt.count("Rounds, in each of which all take a turn.")] = 15,
    threads: opt.Threads = opt.CORES,
    csv: opt.Csv = CSV,
    no_save: opt.NoSave = False,
    as_json: AsJson = False,
) -> None:
    """Time the linear products of one decode step: packed weights beside torch's.

    torch multiplies in float32 and in bfloat16. Shapes are SmolLM2-135M's: 30 layers, and a head of
    49152 rows in 8 bits. Each layer has weights of its own, so that they come from memory as in a
    model. All take turns; ratios are made inside a round.
    """
    import torch

    save = results.checked(csv, no_save)
    torch.manual_seed(0)
    torch.set_num_threads(threads)
    found = rows_of(measure(steps_of(bits or [2, 3, 4, 8], rows), rounds))
    about = {**machine.described(), "threads": threads, "batch": rows, "rounds": rounds}
    results.report(about, found, results.table(found), csv=save, as_json=as_json)


def dense(shape: tuple[int, int], dtype: torch.dtype) -> Product:
    """Return torch's product with a random matrix."""
    import torch
    from torch.nn.functional import linear

    weight = torch.randn(shape).to(dtype)
    return lambda x: linear(x, weight)


def packed(shape: tuple[int, int], bits: int) -> Product:
    """Return ours with a random matrix, asymmetric."""
    import torch

    from quant_kernels import multiply, panels
    from quant_kernels.pack import pack

    groups = (shape[0], shape[1] // GROUP_SIZE)
    values = torch.randint(0, 2**bits, shape, dtype=torch.uint8)
    zeros = torch.randint(0, 2**bits, groups, dtype=torch.uint8)
    scales = torch.rand(groups).bfloat16()
    weight = panels(
        pack(values, bits), scales, zeros, bits=bits, group_size=GROUP_SIZE, inputs=shape[1]
    )
    return lambda x: multiply(x, weight)


def steps_of(bits: Sequence[int], rows: int) -> dict[str, Step]:
    """Return the products of a step by the name of its weights; packed ones have float32 inputs."""
    import torch

    shapes = [*SHAPES * LAYERS, HEAD]
    x = {size: torch.randn(rows, size) for size in (HIDDEN, INTERMEDIATE)}
    found: dict[str, Step] = {}
    for dtype in (torch.float32, torch.bfloat16):
        inputs = {size: values.to(dtype) for size, values in x.items()}
        found[str(dtype).removeprefix("torch.")] = [
            partial(dense(shape, dtype), inputs[shape[1]]) for shape in shapes
        ]
    for each in bits:
        found[f"w{each}"] = [
            partial(packed(shape, HEAD_BITS if shape == HEAD else each), x[shape[1]])
            for shape in shapes
        ]
    return found


def measure(steps: dict[str, Step], rounds: int) -> dict[str, list[float]]:
    """Return the seconds of each round, after one that does not count; the order is reversed every
    other one."""
    times: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds + 1):
        for name in list(steps)[:: 1 if index % 2 else -1]:
            start = time.perf_counter()
            for multiply in steps[name]:
                multiply()
            times[name].append(time.perf_counter() - start)
    return {name: each[1:] for name, each in times.items()}


def rows_of(times: dict[str, list[float]]) -> list[results.Row]:
    """Return one row a step: milliseconds, and how many times faster than torch."""
    rows = []
    for name, mine in times.items():
        row: results.Row = {"weights": name, "ms_median": float(f"{1e3 * np.median(mine):.4g}")}
        for peer in ("float32", "bfloat16"):
            row |= results.spread(f"x_{peer}", np.divide(times[peer], mine))
        rows.append(row)
    return rows


if __name__ == "__main__":
    main(packed_products, "python -m benchmarks.packed_products")
