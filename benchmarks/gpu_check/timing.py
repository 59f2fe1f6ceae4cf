"""Times of each variant's kernels and of others' softmax, in turn, on the same data.

Before each call a buffer much larger than the caches is cleared: nothing is found in them, and the
launches of the call are queued while the device is busy with that. What is wrong is not timed.
"""

from __future__ import annotations

import dataclasses
import functools
import time
from collections.abc import Callable, Iterable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from attn_kernels import get_variant
from attn_kernels.batch import Batch
from attn_kernels.triton import TritonLayer
from benchmarks.gpu_check.checks import Check, Row, SkippedError, Task, first_line
from benchmarks.gpu_check.peers import PEERS
from benchmarks.kernels.candidates import Ours
from benchmarks.kernels.case import Case, Inputs, Paging
from benchmarks.kernels.gate import LIMITS, PEER_LIMITS, Law, check, red

COLD_BYTES = 1 << 30
ROUNDS = 15
HEADS = (32, 8, 16)
"""Query heads, KV heads, tokens of a block."""


def cases(task: Task) -> list[Case]:
    """Decode of one long, some long and many short contexts; prefill without and with a context."""
    head_dim = 128 if 128 in task.head_dims else task.head_dims[0]
    dtype = "bf16" if "bf16" in task.dtypes else task.dtypes[0]
    if task.device == "cpu":
        return [Case("decode", dtype, head_dim, task.longest, 2, 1, 4, 2, 16)]
    return [
        Case("decode", dtype, head_dim, 8192, 8, 1, *HEADS),
        Case("prefill", dtype, head_dim, 0, 1, 2048, *HEADS),
        Case("decode", dtype, head_dim, 32768, 1, 1, *HEADS),
        Case("decode", dtype, head_dim, 1024, 64, 1, *HEADS),
        Case("prefill", dtype, head_dim, 8192, 1, 2048, *HEADS),
    ]


class Sized:
    """A `TritonLayer` whose batches have the case's sizes."""

    def __init__(self, layer: TritonLayer, case: Case) -> None:
        self.layer, self.case = layer, case

    def write_cache(self, key: Tensor, value: Tensor, slot_mapping: Tensor) -> None:
        """Store keys and values."""
        self.layer.write_cache(key, value, slot_mapping)

    def attend(self, query: Tensor, batch: Batch, out: Tensor) -> None:
        """Attention of a batch."""
        batch.max_query_len, batch.max_seq_len = self.case.new_tokens, self.case.seq_len
        self.layer.attend(query, batch, out)


class Kernel:
    """What `benchmarks.kernels.candidates.Kernel` is, for the Triton kernels."""

    isa = "triton"

    def __init__(self, variant: str, case: Case) -> None:
        self.variant, self.case = get_variant(variant), case

    def unsupported(self, head_size: int, block_size: int, dtype: torch.dtype) -> str | None:
        """Everything is supported."""
        return None

    def layer(self, kv_cache: Tensor, **settings: Any) -> Sized:
        """The kernel bound to a cache."""
        layer = TritonLayer(self.variant, kv_cache, **settings)
        if kv_cache.device.type != "cuda":
            layer.num_processors = 1  # an H100's would make 32 parts, and the interpreter is slow
        return Sized(layer, self.case)


class Mine:
    """One variant's kernel as the gate sees it."""

    def __init__(self, variant: str, inputs: Inputs, paging: Paging) -> None:
        self.ours = Ours(get_variant(variant), Kernel(variant, inputs.case), inputs, paging, {})
        self.variant = self.ours.variant
        self.learned = {name: t.cpu() for name, t in self.ours.learned.items()}
        self.run = self.ours.run

    @property
    def out(self) -> Tensor:
        """Output of the last `run`, on the CPU."""
        return self.ours.out.cpu()


class Stopwatch:
    """Microseconds of a call on the device (without a GPU: on the clock)."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        self.buffer = torch.empty(COLD_BYTES if self.cuda else 1, dtype=torch.int8, device=device)

    def time(self, call: Callable[[], object]) -> float:
        """Clear the caches, call, and wait."""
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


def measure(case: Case, task: Task) -> Iterable[Row]:
    """A row for each variant's kernel and each peer."""
    torch.manual_seed(task.seed)
    watch = Stopwatch(task.device)
    rows: list[Row] = []
    ready: list[tuple[Row, Any]] = []
    with torch.device(task.device):
        inputs = Inputs.make(case)
        paging = Paging(case, 1)
        host: dict[str, Any] = {
            field.name: value.cpu()
            for field in dataclasses.fields(inputs)
            if isinstance(value := getattr(inputs, field.name), Tensor)
        }
        makers: dict[str, Callable[[], Any]] = {
            name: functools.partial(Mine, name, inputs, paging) for name in task.variants
        }
        for name, peer in PEERS.items():
            makers[name] = functools.partial(peer, inputs, paging)
        for name, make in makers.items():
            row: Row = {"kernel": name}
            rows.append(row)
            try:
                candidate = make()
                with torch.device("cpu"):
                    on_host = dataclasses.replace(inputs, **host)
                    law = Law.of(candidate.variant, on_host, candidate.learned)
                row["limit"] = (PEER_LIMITS if name in PEERS else LIMITS)[case.dtype]
                row["error"] = check(candidate, on_host, law)
                if why := red(row["error"], row["limit"]):
                    row |= {"status": "failed", "detail": why}
                else:
                    ready.append((row, candidate))
            except SkippedError as why:
                row |= {"status": "skipped", "detail": str(why)}
            except Exception as error:
                row |= {"status": "failed", "detail": first_line(error)}
        times: dict[str, list[float]] = {row["kernel"]: [] for row, _ in ready}
        for _, candidate in ready:
            watch.time(candidate.run)  # warm
        for index in range(ROUNDS if watch.cuda else 1):
            for row, candidate in ready[:: -1 if index % 2 else 1]:
                times[row["kernel"]].append(watch.time(candidate.run))
    for row, _ in ready:
        p20, median, p80 = np.percentile(times[row["kernel"]], (20, 50, 80)).tolist()
        row |= {"us_p20": p20, "us_median": median, "us_p80": p80}
        row["kv_gb_per_s"] = case.kv_bytes / median / 1e3
        row["tflops"] = case.flops / median / 1e6
        for name in PEERS:
            if times.get(name):
                ratios = np.array(times[row["kernel"]]) / np.array(times[name])
                row[f"by {name}"] = float(np.median(ratios))
    return rows


def checks(task: Task) -> list[Check]:
    """One a case."""
    return [Check(case.describe(), functools.partial(measure, case, task)) for case in cases(task)]
