"""Time each variant's GPU kernels and the softmax kernels of others: `python -m benchmarks.gpu`."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from attnserve import machine
from attnserve.command import AsJson, main
from attnserve.errors import UserError
from benchmarks import RESULTS, results
from benchmarks import options as opt
from benchmarks.gpu_peers import PEERS, MissingError

if TYPE_CHECKING:
    from torch import Tensor

    from benchmarks.kernels.case import Case, Inputs, Paging

CSV = RESULTS / "gpu.csv"
COLD_BYTES = 1 << 30
"""Cleared before each call: nothing is found in caches, and the call's launches are queued while
the device is busy with that."""

ROUNDS = 15
PACKAGES = ("torch", "triton", "vllm", "flash_attn")


def gpu(
    minutes: Annotated[
        float, opt.option("No case begins after this time; those that are left are named.", min=0)
    ] = 3.0,
    variants: Annotated[list[str] | None, opt.option("Which (default: all).")] = None,
    peers: Annotated[list[str] | None, opt.option("Which of the others (default: all).")] = None,
    seed: opt.Seed = 0,
    device: Annotated[
        Literal["cuda", "cpu"],
        opt.option("cpu: one tiny case in Triton's interpreter, to try the command itself."),
    ] = "cuda",
    csv: opt.Csv = CSV,
    no_save: opt.NoSave = False,
    as_json: AsJson = False,
) -> int:
    """Time each variant's GPU kernels and the softmax kernels of others, in turn.

    The others are FlashAttention (the package flash_attn, and the one in vLLM's CUDA build), vLLM's
    Triton kernel and torch's FlexAttention, as far as they are installed. All get the same data in
    bfloat16. Before a case is timed, all outputs are compared with the float64 reference, which is
    computed on the GPU; what is wrong is not timed, and the exit code is 1. Ratios are our time by
    theirs, inside a round.

    Each case's rows are added to the CSV as soon as it is measured. Run again, the command goes on
    with the cases that the CSV does not have of this GPU, commit and software.
    """
    import torch

    from attn_kernels import get_variant, variant_names

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(
            f"torch {torch.__version__} finds no GPU; in an environment with CUDA's torch: "
            "pip install -e '.[cuda,bench,dev]', then make gpu-check GPU_PYTHON=that/python"
        )
    names = [get_variant(name).name for name in variants or variant_names()]
    others = peers or list(PEERS)
    if unknown := sorted(set(others) - set(PEERS)):
        raise UserError(f"--peers {' '.join(unknown)}: there are {', '.join(PEERS)}")
    about = described(device)
    save = results.checked(csv, no_save)
    deadline = time.monotonic() + 60 * minutes
    rows: list[results.Row] = []
    left = []
    for case in cases(device):
        kept = known(save, about, case, seed) if save is not None else []
        if kept:
            print(f"{case}: taken from {save}", file=sys.stderr)
        elif time.monotonic() > deadline:
            left.append(str(case))
        else:
            print(f"{case} ...", file=sys.stderr, flush=True)
            kept = measure(case, names, others, device, seed)
            if save is not None:
                results.append_csv(save, about, kept)
            if any("CUDA error" in row["note"] for row in kept):
                print("the GPU does not answer this process any more; run again", file=sys.stderr)
                deadline = 0.0
        rows += kept
    if left:
        print(f"out of time, run again for: {'; '.join(left)}", file=sys.stderr)
    results.report(about, rows, table(rows), csv=None, as_json=as_json)
    return 1 if any(row["status"] == "failed" for row in rows) else 0


def described(device: str) -> dict[str, Any]:
    """Return what the run is made on and with."""
    import torch
    from torch.utils import collect_env

    about: dict[str, Any] = {"date": datetime.now(UTC).isoformat(timespec="seconds")}
    about |= {"device": machine.cpu_model(), "capability": "", "multiprocessors": 0, "driver": ""}
    if device == "cuda":
        found = torch.cuda.get_device_properties(0)
        about |= {"device": found.name, "capability": f"{found.major}.{found.minor}"}
        about |= {
            "multiprocessors": found.multi_processor_count,
            "driver": collect_env.get_nvidia_driver_version(collect_env.run) or "",
        }
    about["cuda"] = torch.version.cuda or torch.version.hip or ""
    about |= {name: machine.package(name) for name in PACKAGES}
    return about | {"commit": machine.commit()}


def cases(device: str) -> list[Case]:
    """Return decode of some long, one very long and many short contexts, prefill of two lengths,
    and a chunk of a prefill behind a long context."""
    from benchmarks.kernels.case import Case

    if device == "cpu":
        return [Case("decode", "fp32", 32, 12, 2, 1, 4, 2, 16)]
    heads = (32, 8, 64)  # query heads, KV heads, tokens of a block, as served
    return [
        Case("decode", "bf16", 128, 8192, 8, 1, *heads),
        Case("prefill", "bf16", 128, 0, 1, 2048, *heads),
        Case("decode", "bf16", 128, 32768, 1, 1, *heads),
        Case("decode", "bf16", 128, 1024, 64, 1, *heads),
        Case("prefill", "bf16", 128, 0, 1, 8192, *heads),
        Case("prefill", "bf16", 128, 32768, 1, 512, *heads),
    ]


def known(csv: Any, about: dict[str, Any], case: Case, seed: int) -> list[results.Row]:
    """Return the rows that a CSV has of a case, measured on the same GPU with the same software."""
    if not csv.exists():
        return []
    same = {**{k: v for k, v in about.items() if k != "date"}, "case": case, "seed": seed}
    frame = results.read_csv(csv)
    frame = frame[(frame[list(same)] == list(map(str, same.values()))).all(axis=1)]
    numbers = ("us_", "ratio_", "kv_gb", "tflops", "error")
    return [
        {k: (float(v) if v else None) if str(k).startswith(numbers) else v for k, v in row.items()}
        for row in frame.drop(columns=list(about)).to_dict("records")
    ]


class Stopwatch:
    """Microseconds of a call on the device (without a GPU: on the clock)."""

    def __init__(self, device: str) -> None:
        import torch

        self.cuda = device == "cuda"
        self.buffer = torch.empty(COLD_BYTES if self.cuda else 1, dtype=torch.int8, device=device)

    def time(self, call: Callable[[], object]) -> float:
        """Clear the caches, call, wait, and return how long the call took."""
        import torch

        self.buffer.zero_()
        if not self.cuda:
            start = time.perf_counter()
            call()
            return (time.perf_counter() - start) * 1e6
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        return float(begin.elapsed_time(end)) * 1e3


def measure(
    case: Case, variants: Sequence[str], peers: Sequence[str], device: str, seed: int
) -> list[results.Row]:
    """Return a row for each variant's kernel and each kernel of others."""
    import torch

    from benchmarks import gpu_reference
    from benchmarks.kernels.case import Inputs, Paging
    from benchmarks.kernels.check import LIMITS, PEER_LIMITS, complaint

    torch.manual_seed(seed)
    watch = Stopwatch(device)
    rows: list[results.Row] = []
    ready: dict[str, Any] = {}
    with torch.device(device):
        inputs = Inputs.make(case)
        paging = Paging(case, 1)
        outputs: dict[str, Tensor] = {}  # by variant: the peers have softmax's
        makers: dict[str, Callable[[], Any]] = {
            name: functools.partial(ours, name, inputs, paging, device) for name in variants
        }
        makers |= {name: functools.partial(PEERS[name], inputs, paging) for name in peers}
        for name, make in makers.items():
            row: results.Row = {"case": str(case), "seed": seed, "kernel": name}
            row |= {"status": "ok", "error": None, "note": ""}
            rows.append(row)
            try:
                candidate = make()
                variant = candidate.variant
                if variant.name not in outputs:
                    outputs[variant.name] = gpu_reference.expected(
                        variant, inputs, candidate.learned
                    )
                row["error"] = gpu_reference.error_of(candidate, inputs, outputs[variant.name])
                limits = PEER_LIMITS if name in PEERS else LIMITS
                if why := complaint(row["error"], limits[case.dtype]):
                    row |= {"status": "failed", "note": why}
                else:
                    watch.time(candidate.run)  # warm
                    ready[name] = candidate
            except MissingError as error:
                row |= {"status": "skipped", "note": str(error)}
            except Exception as error:  # of a compiler or a driver: the others go on
                line = str(error).strip().partition("\n")[0]
                row |= {"status": "failed", "note": f"{type(error).__name__}: {line}"}
        times: dict[str, list[float]] = {name: [] for name in ready}
        for index in range(ROUNDS if watch.cuda else 1):
            for name in list(ready)[:: -1 if index % 2 else 1]:
                times[name].append(watch.time(ready[name].run))
    for row in rows:
        mine = times.get(row["kernel"], [])
        row |= results.spread("us", mine)
        median = row["us_median"]
        row["kv_gb_per_s"] = case.kv_bytes / median / 1e3 if mine else None
        row["tflops"] = case.flops / median / 1e6 if mine else None
        for name in PEERS:
            both = bool(mine and times.get(name))
            ratio = np.median(np.divide(mine, times[name])) if both else None
            row[f"ratio_{name}"] = None if ratio is None else float(ratio)
    return rows


def table(rows: Sequence[results.Row]) -> str:
    """Return a line a kernel; of one that was not timed, why."""
    lines = []
    for row in rows:
        line = {"case": row["case"], "kernel": row["kernel"]}
        line["us (p20-p80)"] = results.shown(row, "us", 1)
        for name, column in (("GB/s", "kv_gb_per_s"), ("TFLOPS", "tflops")):
            line[name] = "-" if row[column] is None else f"{row[column]:.1f}"
        for name in PEERS:
            ratio = row[f"ratio_{name}"]
            line[f"/{name}"] = "-" if ratio is None else f"{ratio:.2f}"
        lines.append(line | {"note": row["note"][:120]})
    return results.table(lines)


def ours(name: str, inputs: Inputs, paging: Paging, device: str) -> Any:
    """Return one variant's kernel."""
    from attn_kernels import get_variant
    from attn_kernels.triton import TritonLayer
    from benchmarks.kernels.candidates import Ours

    variant = get_variant(name)
    candidate = Ours(variant, functools.partial(TritonLayer, variant), inputs, paging, {})
    if device != "cuda":
        candidate.layer.num_multiprocessors = 1  # a GPU's would make 32 parts; interpreting is slow
    return candidate


if __name__ == "__main__":
    main(gpu, "python -m benchmarks.gpu")
