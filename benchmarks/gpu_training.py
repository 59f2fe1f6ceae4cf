"""Time training's attention on a GPU: `python -m benchmarks.gpu_training`."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import numpy as np

from attnserve.command import AsJson, main
from attnserve.errors import UserError
from benchmarks import RESULTS, results
from benchmarks import options as opt
from benchmarks.gpu import ROUNDS, Stopwatch, described

if TYPE_CHECKING:
    from torch import Tensor

PEERS = ("sdpa", "flex_attention")


@dataclass(frozen=True)
class Case:
    """Whole causal sequences, in bfloat16."""

    batch: int
    heads: int
    kv_heads: int
    tokens: int
    head_dim: int

    def __str__(self) -> str:
        return f"{self.batch}x{self.tokens} h{self.heads}kv{self.kv_heads} d{self.head_dim}"

    @property
    def flops(self) -> float:
        """Floating-point operations of a forward and a backward of softmax: 2 and 5 products."""
        return 7.0 * self.batch * self.heads * self.tokens**2 * self.head_dim


CASES = {
    "cuda": (Case(8, 9, 3, 2048, 64), Case(2, 32, 8, 4096, 128), Case(1, 32, 8, 16384, 128)),
    "cpu": (Case(1, 1, 1, 20, 16),),
}
"""SmolLM2-135M's heads, and Llama-8B's at two lengths."""

Call = Callable[["Tensor", "Tensor", "Tensor"], "Tensor"]


def gpu_training(
    minutes: Annotated[float, opt.option("No case begins after this time.", min=0)] = 3.0,
    variants: Annotated[
        list[str] | None, opt.option("Which (default: all that kernels train).")
    ] = None,
    seed: opt.Seed = 0,
    device: Annotated[
        Literal["cuda", "cpu"],
        opt.option("cpu: one tiny case in Triton's interpreter, to try the command itself."),
    ] = "cuda",
    csv: opt.Csv = RESULTS / "gpu_training.csv",
    no_save: opt.NoSave = False,
    as_json: AsJson = False,
) -> int:
    """Time forward and backward of each variant's training kernels, and of softmax by others.

    The others are torch's scaled_dot_product_attention, with keys and values repeated for the
    groups where it wants that, and FlexAttention, compiled. All get the same bfloat16 data, in
    turn in each round. Ratios are our time by theirs, inside a round. What fails is named in its
    row, and the exit code is 1.
    """
    import torch

    from attn_kernels import get_variant, variant_names
    from attn_kernels.triton.variant import missing_derivative

    if device == "cuda" and not torch.cuda.is_available():
        raise UserError(f"torch {torch.__version__} finds no GPU; see docs/GPU.md")
    about, save = described(device), results.checked(csv, no_save)
    deadline = time.monotonic() + 60 * minutes
    names = variants or [n for n in variant_names() if not missing_derivative(get_variant(n))]
    rows: list[results.Row] = []
    for case in CASES[device]:
        if time.monotonic() > deadline:
            print(f"out of time before {case}", file=sys.stderr)
            break
        print(f"{case} ...", file=sys.stderr, flush=True)
        found = measure(case, names, device, seed)
        if save is not None:
            results.append_csv(save, about, found)
        rows += found
    results.report(about, rows, table(rows), csv=None, as_json=as_json)
    return 1 if any(row["note"] for row in rows) else 0


def calls_of(variants: list[str], case: Case, device: str) -> dict[str, Call]:
    """Return what is timed, by name."""
    import torch
    from torch.nn.functional import scaled_dot_product_attention

    from attn_kernels import get_variant
    from attn_kernels.triton.training import attention

    grouped = case.heads > case.kv_heads
    calls: dict[str, Call] = {}
    for name in variants:
        variant = get_variant(name)
        learned = {key: torch.full((case.heads,), 0.2, device=device) for key in variant.learned}
        shape = case.batch, case.heads, case.tokens
        gates = torch.full(shape, -1e-3, device=device) if variant.gated else None
        calls[name] = functools.partial(attention, variant, learned=learned, gates=gates)
    calls["sdpa"] = functools.partial(
        scaled_dot_product_attention, is_causal=True, enable_gqa=grouped
    )
    if device == "cuda":
        from torch.nn.attention.flex_attention import create_block_mask, flex_attention

        mask = create_block_mask(
            lambda b, h, i, j: i >= j, None, None, case.tokens, case.tokens, device=device
        )
        calls["flex_attention"] = functools.partial(
            torch.compile(flex_attention), block_mask=mask, enable_gqa=grouped
        )
    return calls


def measure(case: Case, variants: list[str], device: str, seed: int) -> list[results.Row]:
    """Return a row of each variant and each of the others."""
    import torch

    torch.manual_seed(seed)
    shapes = [
        (case.batch, h, case.tokens, case.head_dim) for h in (case.heads, *[case.kv_heads] * 2)
    ]
    dtype = torch.bfloat16 if device == "cuda" else torch.float32
    q, k, v = (torch.randn(s, device=device, dtype=dtype, requires_grad=True) for s in shapes)
    gradient = torch.randn(shapes[0], device=device, dtype=dtype)
    watch = Stopwatch(device)
    times: dict[str, dict[str, list[float]]] = {}
    notes: dict[str, str] = {}

    def once(call: Call) -> tuple[float, float]:
        outputs: list[Any] = []
        forward = watch.time(lambda: outputs.append(call(q, k, v)))
        backward = watch.time(lambda: torch.autograd.grad(outputs[0], (q, k, v), gradient))
        return forward, backward

    calls = calls_of(variants, case, device)
    for name, call in list(calls.items()):
        times[name], notes[name] = {"forward": [], "both": []}, ""
        try:
            once(call)
            once(call)
        except Exception as error:  # of a compiler or a driver: the others go on
            line = str(error).strip().partition("\n")[0]
            notes[name] = f"{type(error).__name__}: {line}"[:200]
            del calls[name]
    for index in range(ROUNDS if watch.cuda else 1):
        for name in list(calls)[:: -1 if index % 2 else 1]:
            forward, backward = once(calls[name])
            times[name]["forward"].append(forward)
            times[name]["both"].append(forward + backward)
    rows = []
    for name, mine in times.items():
        row: results.Row = {"case": str(case), "seed": seed, "kernel": name, "note": notes[name]}
        row |= results.spread("us_forward", mine["forward"]) | results.spread("us", mine["both"])
        row["tflops"] = case.flops / row["us_median"] / 1e6 if mine["both"] else None
        for peer in PEERS:
            theirs = times.get(peer, {"both": []})["both"]
            whole = bool(mine["both"] and theirs)
            ratio = float(np.median(np.divide(mine["both"], theirs))) if whole else None
            row[f"ratio_{peer}"] = ratio
        rows.append(row)
    return rows


def table(rows: list[results.Row]) -> str:
    """Return a line a kernel."""
    lines = []
    for row in rows:
        line = {"case": row["case"], "kernel": row["kernel"]}
        line["forward us"] = results.shown(row, "us_forward", 1)
        line["and backward"] = results.shown(row, "us", 1)
        line["TFLOPS"] = "-" if row["tflops"] is None else f"{row['tflops']:.1f}"
        for peer in PEERS:
            ratio = row[f"ratio_{peer}"]
            line[f"/{peer}"] = "-" if ratio is None else f"{ratio:.2f}"
        lines.append(line | {"note": row["note"]})
    return results.table(lines)


if __name__ == "__main__":
    main(gpu_training, "python -m benchmarks.gpu_training")
