"""Products and lookups with packed weights: every width, each kernel and tile, groupings and zero
points, against float64 products with the dequantized matrix."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from itertools import product
from typing import Any

import torch

from benchmarks.gpu_check.checks import Check, Row, Task
from benchmarks.kernels.case import DTYPES
from quant_kernels import Panels, panels
from quant_kernels.pack import pack
from quant_kernels.weight import BITS, QuantizedWeight, QuantSpec

TOLERANCES = {"fp32": 2e-6, "bf16": 2**-8, "fp16": 2**-11}
"""Of an output, relative to the sum of the absolute products."""

OUTPUTS, COLUMNS = 150, 1100
"""No whole panel, chunk or group."""

ROWS = {"cuda": (1, 2, 3, 4, 5, 16, 17, 70), "cpu": (1, 5)}
"""Of x: fewer in the slow interpreter."""

GROUPS = {"cuda": ((96, "half"), (128, "codes"), (None, "none")), "cpu": ((128, "codes"),)}
"""Columns that share a scale, and what zero points are."""


def matrix(bits: int, group: int | None, zeros: str, seed: int) -> QuantizedWeight:
    """A random one."""
    generator = torch.Generator().manual_seed(seed)
    spec = QuantSpec(bits, group, zeros == "none")
    shape = OUTPUTS, spec.groups(COLUMNS)
    codes = torch.randint(0, 2**bits, (OUTPUTS, COLUMNS), generator=generator, dtype=torch.uint8)
    scales = (torch.rand(shape, generator=generator) + 0.1).bfloat16()
    points = None
    if zeros == "codes":
        points = torch.randint(0, 2**bits, shape, generator=generator, dtype=torch.uint8)
    elif zeros == "half":
        points = (torch.rand(shape, generator=generator) * 2**bits).half()
    return QuantizedWeight(codes, scales, points, spec)


def check(bits: int, dtype: str, task: Task) -> Iterable[Row]:
    """A row for products, with the largest error, and one for lookups, which are exact."""
    from quant_kernels import triton

    device, kind = torch.device(task.device), DTYPES[dtype]
    generator = torch.Generator().manual_seed(task.seed)
    worst, wrong = 0.0, 0
    for group, zeros in GROUPS[task.device]:
        weight = matrix(bits, group, zeros, task.seed)
        exact = weight.dequantize()
        found = panels(pack(weight.values, bits), weight.scales, weight.zeros, bits, COLUMNS)
        points = None if found.zeros is None else found.zeros.to(device)
        stored = Panels(found.words.to(device), found.scales.to(device), points)
        size = group or 4096
        for rows in ROWS[task.device]:
            x = torch.randn(rows, COLUMNS, generator=generator).to(kind)
            given = x.to(device)
            y = triton.multiply(given, stored, bits, size, OUTPUTS).cpu().double()
            law, scale = x.double() @ exact.double().T, x.double().abs() @ exact.double().abs().T
            error = float(((y - law).abs() / scale).max())
            worst = error if error != error else max(worst, error)
        ids = torch.randint(0, OUTPUTS, (33,), generator=generator)
        taken = triton.gather(ids.to(device), stored, bits, size, OUTPUTS, COLUMNS, kind).cpu()
        wrong += int((taken != exact[ids].to(kind)).sum())
    columns: dict[str, Any] = {"variant": f"{bits} bits", "dtype": dtype}
    limit = TOLERANCES[dtype]
    kept = worst <= limit  # a NaN is not
    yield {
        **columns,
        "phase": "product",
        "status": "ok" if kept else "failed",
        "detail": "" if kept else f"error {worst:.1e}, limit {limit:.0e}",
        "error": worst if worst == worst else None,
        "limit": limit,
    }
    detail = f"{wrong} numbers differ" if wrong else ""
    yield {**columns, "phase": "lookup", "status": "failed" if wrong else "ok", "detail": detail}


def checks(task: Task) -> list[Check]:
    """One a width and dtype."""
    return [
        Check(f"{bits} bits {dtype}", functools.partial(check, bits, dtype, task))
        for dtype, bits in product(task.dtypes, BITS)
    ]
