"""Time packed products on a GPU: `python -m benchmarks.gpu_packed`."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import product
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from attnserve import machine
from attnserve.command import AsJson, main
from attnserve.errors import UserError
from benchmarks import RESULTS, results
from benchmarks import options as opt
from benchmarks.gpu import ROUNDS, Stopwatch, described
from benchmarks.gpu_peers import MissingError, imported

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from quant_kernels.weight import QuantizedWeight

    Product = Callable[[Tensor], Tensor]
    """Of inputs `[rows, inputs]` to outputs `[rows, outputs]`."""

OURS = "packed"
BITS = 4
GROUP_SIZE = 128
LIMIT = 2.0**-7
"""Largest error, relative to the sum of the absolute products: weights and outputs are each rounded
to bfloat16 where the matrix is unpacked, as in the kernels of others."""


@dataclass(frozen=True)
class Case:
    """One matrix of 4 bits and the rows that it meets.

    Attributes:
        symmetric: without zero points, as GPTQ's checkpoints are mostly; else with, as AWQ's.
    """

    outputs: int
    inputs: int
    symmetric: bool
    rows: int

    def __str__(self) -> str:
        kind = "symmetric" if self.symmetric else "asymmetric"
        return f"{self.outputs}x{self.inputs} {kind} {self.rows} rows"

    @property
    def weight_bytes(self) -> float:
        """Bytes of the packed weight: values, and a scale and a zero point in each group."""
        groups = self.outputs * self.inputs / GROUP_SIZE
        return self.outputs * self.inputs * BITS / 8 + groups * (2 if self.symmetric else 3)

    @property
    def flops(self) -> float:
        """Floating-point operations."""
        return 2.0 * self.rows * self.outputs * self.inputs


ROWS = (1, 16, 64, 256, 2048)
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
"""Outputs and inputs of Llama-8B's matrices: QKV, attention's output, gate and up, down."""

CASES = {
    "cuda": [
        *(Case(*shape, True, rows) for shape, rows in product(SHAPES, ROWS)),
        *(Case(*SHAPES[0], False, rows) for rows in ROWS),
    ],
    "cpu": [Case(64, 256, True, 3), Case(64, 256, False, 3)],
}


def gpu_packed(
    minutes: Annotated[float, opt.option("No case begins after this time.", min=0)] = 3.0,
    seed: opt.Seed = 0,
    device: Annotated[
        Literal["cuda", "cpu"],
        opt.option("cpu: two tiny cases in Triton's interpreter, to try the command itself."),
    ] = "cuda",
    csv: opt.Csv = RESULTS / "gpu_packed.csv",
    no_save: opt.NoSave = False,
    as_json: AsJson = False,
) -> int:
    """Time products with packed weights of 4 bits, and what others have for them.

    The others are vLLM's Marlin, as it serves GPTQ's and AWQ's checkpoints, and torch's product in
    bfloat16 with a weight that was never packed. Shapes are Llama-8B's, in groups of 128. Each
    output is compared with the float64 product first; what is wrong is not timed, and the exit code
    is 1. All take turns in each round, with cold caches. Ratios are our time by theirs, inside a
    round.
    """
    import torch

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} finds no GPU; see docs/GPU.md")
    about, save = described(device), results.checked(csv, no_save)
    deadline = time.monotonic() + 60 * minutes
    rows: list[results.Row] = []
    for case in CASES[device]:
        if time.monotonic() > deadline:
            print(f"out of time before {case}", file=sys.stderr)
            break
        print(f"{case} ...", file=sys.stderr, flush=True)
        found = measure(case, device, seed)
        if save is not None:
            results.append_csv(save, about, found)
        rows += found
    results.report(about, rows, table(rows), csv=None, as_json=as_json)
    return 1 if any(row["status"] == "failed" for row in rows) else 0


def random_weight(outputs: int, inputs: int, symmetric: bool) -> QuantizedWeight:
    """Return a random quantized matrix; scales are bfloat16, zero points integers."""
    import torch

    from quant_kernels.weight import QuantizedWeight, QuantSpec

    spec = QuantSpec(BITS, GROUP_SIZE, symmetric)
    groups = outputs, spec.groups(inputs)
    values = torch.randint(0, 2**BITS, (outputs, inputs), dtype=torch.uint8)
    zeros = None if symmetric else torch.randint(0, 2**BITS, groups, dtype=torch.uint8)
    return QuantizedWeight(values, (torch.rand(groups) + 0.1).bfloat16(), zeros, spec)


def ours(weight: QuantizedWeight, device: str, dtype: torch.dtype) -> Product:
    """Return our kernels' product, of any case's number of rows compiled."""
    from attn_kernels.triton.launch import compile_only
    from quant_kernels import panels, triton
    from quant_kernels.pack import pack

    found = panels(
        pack(weight.values, BITS),
        weight.scales,
        weight.zeros,
        bits=BITS,
        group_size=GROUP_SIZE,
        inputs=weight.values.shape[1],
    )
    zeros = None if found.zeros is None else found.zeros.to(device)
    stored = found._replace(
        words=found.words.to(device), scales=found.scales.to(device), zeros=zeros
    )
    with compile_only():
        triton.compile_launches(stored, dtype, max(ROWS))
    return lambda x: triton.multiply(x, stored)


def require_cuda_vllm(device: str) -> None:
    """Make sure of vLLM's CUDA build.

    Raises:
        MissingError: it is not here.
    """
    version = machine.package("vllm")
    if device != "cuda" or not version or version.endswith("+cpu"):
        raise MissingError(f"vLLM for CUDA is not installed (found {version or 'none'})")


def marlin(weight: QuantizedWeight, device: str, dtype: torch.dtype) -> Product:
    """Return the product of vLLM's Marlin kernel, its weight brought into its order as vLLM 0.32
    does (model_executor/kernels/linear/mixed_precision/marlin.py)."""
    import torch

    from quant_kernels.pack import pack

    require_cuda_vllm(device)
    of_vllm = functools.partial(
        imported, "vllm.model_executor.layers.quantization.utils.marlin_utils"
    )
    types: Any = imported("vllm.scalar_type", "scalar_types")
    outputs, inputs = weight.values.shape
    words = pack(weight.values, BITS).T.contiguous().to(device)
    repacked = imported("vllm._custom_ops", "gptq_marlin_repack")(
        words, size_k=inputs, size_n=outputs, num_bits=BITS
    )
    scales = of_vllm("marlin_permute_scales")(
        weight.scales.T.contiguous().to(device, dtype),
        size_k=inputs,
        size_n=outputs,
        group_size=GROUP_SIZE,
    )
    place = torch.empty(0, device=device).device
    if weight.zeros is None:
        kind, zeros = types.uint4b8, of_vllm("marlin_make_empty")(place)
    else:
        kind = types.uint4
        zeros = of_vllm("marlin_zero_points")(
            weight.zeros.T.contiguous().int().to(device),
            size_k=weight.zeros.shape[1],
            size_n=outputs,
            num_bits=BITS,
        )
    return functools.partial(
        of_vllm("apply_gptq_marlin_linear"),
        weight=repacked,
        weight_scale=scales,
        weight_zp=zeros,
        workspace=of_vllm("get_marlin_workspace")(place),
        wtype=kind,
        output_size_per_partition=outputs,
        input_size_per_partition=inputs,
    )


def dense(weight: QuantizedWeight, device: str, dtype: torch.dtype) -> Product:
    """Return torch's product with the dequantized matrix."""
    import torch

    matrix = weight.dequantize().to(device, dtype)
    return lambda x: torch.mm(x, matrix.T)


MAKERS = {OURS: ours, "vLLM Marlin": marlin, "torch": dense}
PEERS = tuple(MAKERS)[1:]


@functools.lru_cache(maxsize=1)
def products(
    outputs: int, inputs: int, symmetric: bool, device: str, dtype: torch.dtype, seed: int
) -> tuple[Tensor, dict[str, Product | Exception]]:
    """Return a random matrix in float64, and products with it by name, or why there is none."""
    import torch

    torch.manual_seed(seed)
    weight = random_weight(outputs, inputs, symmetric)
    made: dict[str, Product | Exception] = {}
    for name, make in MAKERS.items():
        try:
            made[name] = make(weight, device, dtype)
        except Exception as error:  # of a compiler or a driver: the others go on
            made[name] = error
    return weight.dequantize().to(device).double(), made


def error_of(y: Tensor, x: Tensor, matrix: Tensor) -> float:
    """Return the largest error of `y` against the float64 product `x @ matrix.T`, relative to the
    sum of the absolute products; NaN if an output is."""
    exact, size = x.double() @ matrix.T, x.double().abs() @ matrix.abs().T
    return float(((y.double() - exact).abs() / size).max())


def measure(case: Case, device: str, seed: int) -> list[results.Row]:
    """Return a row of ours and of each of the others."""
    import torch

    # The interpreter's bfloat16 has no arithmetic.
    dtype = torch.bfloat16 if device == "cuda" else torch.float16
    watch = Stopwatch(device)
    matrix, made = products(case.outputs, case.inputs, case.symmetric, device, dtype, seed)
    x = torch.randn(case.rows, case.inputs).to(device, dtype)
    rows: list[results.Row] = []
    ready: dict[str, Callable[[], Tensor]] = {}
    for name, multiply in made.items():
        row: results.Row = {"case": str(case), "seed": seed, "kernel": name}
        row |= {"status": "ok", "error": None, "note": ""}
        rows.append(row)
        try:
            if isinstance(multiply, Exception):
                raise multiply
            call = functools.partial(multiply, x)
            row["error"] = error_of(call(), x, matrix)
            if row["error"] <= LIMIT:
                watch.time(call)  # warm
                ready[name] = call
            else:
                note = f"error {row['error']:.1e} against the float64 product"
                row |= {"status": "failed", "note": note}
        except MissingError as error:
            row |= {"status": "skipped", "note": str(error)}
        except Exception as error:  # of a compiler or a driver: the others go on
            line = str(error).strip().partition("\n")[0]
            row |= {"status": "failed", "note": f"{type(error).__name__}: {line}"[:200]}
    times: dict[str, list[float]] = {name: [] for name in ready}
    for index in range(ROUNDS if watch.cuda else 1):
        for name in list(ready)[:: -1 if index % 2 else 1]:
            times[name].append(watch.time(ready[name]))
    for row in rows:
        mine = times.get(row["kernel"], [])
        row |= results.spread("us", mine)
        median = row["us_median"]
        packed = mine and row["kernel"] != "torch"
        row["weight_gb_per_s"] = case.weight_bytes / median / 1e3 if packed else None
        row["tflops"] = case.flops / median / 1e6 if mine else None
        for name in PEERS:
            both = bool(mine and times.get(name))
            ratio = float(np.median(np.divide(mine, times[name]))) if both else None
            row[f"ratio_{name}"] = ratio
    return rows


def table(rows: list[results.Row]) -> str:
    """Return a line a product."""
    lines = []
    for row in rows:
        line: dict[str, Any] = {"case": row["case"], "kernel": row["kernel"]}
        line["us (p20-p80)"] = results.shown(row, "us", 1)
        for name, column in (("GB/s", "weight_gb_per_s"), ("TFLOPS", "tflops")):
            line[name] = "-" if row[column] is None else f"{row[column]:.1f}"
        for name in PEERS:
            ratio = row[f"ratio_{name}"]
            line[f"/{name}"] = "-" if ratio is None else f"{ratio:.2f}"
        lines.append(line | {"note": row["note"]})
    return results.table(lines)


if __name__ == "__main__":
    main(gpu_packed, "python -m benchmarks.gpu_packed")
