"""What candidates are timed with: batches of one kind, with caches that are read in turn."""

from __future__ import annotations

import functools
import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from attn_kernels import get_variant, reference
from attn_kernels.batch import Batch
from attn_kernels.paged import content_bytes
from attn_kernels.triton import TritonLayer
from attn_kernels.triton.tuned import SHORT_PREFILL, Kind, trying
from attn_kernels.triton.tuning import DECODE, PREFILL, Tile


class Load(NamedTuple):
    """Equal requests."""

    batch: int
    new_tokens: int
    seq_len: int
    """Tokens of each in the cache, the new ones included."""


LOADS = {
    DECODE: (Load(8, 1, 8192), Load(64, 1, 1024), Load(1, 1, 32768)),
    PREFILL: (Load(1, 2048, 2048), Load(1, 2048, 10240)),
    SHORT_PREFILL: (Load(1, 512, 8704), Load(1, 256, 256)),
}
"""What is timed: all candidates with the first, the best with all of them."""

TINY_LOADS = {
    DECODE: (Load(3, 1, 37), Load(1, 1, 50)),
    PREFILL: (Load(1, 21, 30), Load(2, 9, 9)),
    SHORT_PREFILL: (Load(1, 11, 30), Load(2, 5, 5)),
}
"""The same in the interpreter."""

CHECKED = {DECODE: Load(3, 1, 77), PREFILL: Load(2, 45, 77), SHORT_PREFILL: Load(1, 19, 64)}
"""What is compared with the float64 reference."""

LIMITS = {"float32": 1e-5, "bfloat16": 1e-2, "float16": 2e-3}
"""Largest error by dtype, relative to a query's largest output."""


class Work:
    """A batch of a kind's kernel, with several caches.

    Args:
        kind: the kernel.
        load: the batch.
        num_kv_heads: KV heads.
        device: where it runs.
        cold_bytes: the caches have at least so many together, so that none is found in the
            device's caches when its turn comes.
        launched: something is launched; else keys, values and caches take no memory.
        arch: of the device that kernels are compiled for, "sm_90"; the device's own if None.
    """

    def __init__(
        self,
        kind: Kind,
        load: Load,
        num_kv_heads: int,
        device: str,
        cold_bytes: int = 0,
        launched: bool = True,
        arch: str | None = None,
    ) -> None:
        self.kind, self.load, self.launched, self.arch = kind, load, launched, arch
        self.variant, self.dtype = get_variant(kind.variant), getattr(torch, kind.dtype)
        num_heads, block_size = num_kv_heads * kind.group, kind.block_size
        blocks = -(-load.seq_len // block_size)
        content = content_bytes(self.variant, kind.head_size, self.dtype, group=kind.group)
        of_one = load.batch * blocks * num_kv_heads * block_size * content
        self.copies = max(2, -(-cold_bytes // of_one))
        generator = torch.Generator(device).manual_seed(0)
        with torch.device(device):
            normal = functools.partial(torch.randn, generator=generator, dtype=self.dtype)
            tokens = load.batch * load.new_tokens
            self.query = normal(tokens, num_heads, kind.head_size)
            of_keys = (load.batch * launched, load.seq_len, num_kv_heads, kind.head_size)
            self.key, self.value = normal(of_keys), normal(of_keys)
            self.out = torch.zeros_like(self.query)
            total = self.copies * load.batch * blocks
            order = torch.randperm(total, dtype=torch.int32, generator=generator)
            self.tables = order.view(self.copies, load.batch, blocks)
            shape = (total if launched else 1, num_kv_heads, block_size, content)
            self.kv = torch.zeros(shape, dtype=torch.uint8).view(self.dtype)
            self.learned = {
                name: torch.full((num_heads,), self.variant.initial(name))
                for name in self.variant.learned
            }
            starts = torch.arange(load.batch + 1, dtype=torch.int32) * load.new_tokens
            lens = torch.full((load.batch,), load.seq_len, dtype=torch.int32)
        self.batches = [
            Batch(table, starts, lens, max_query_len=load.new_tokens, max_seq_len=load.seq_len)
            for table in self.tables
        ]
        self.scale = kind.head_size**-0.5

    def layer(self) -> TritonLayer:
        """Return the kernels, bound to the caches."""
        layer = TritonLayer(
            self.variant,
            self.kv,
            num_heads=self.query.shape[1],
            scale=self.scale,
            learned=self.learned,
            arch=self.arch,
        )
        if self.launched and not self.kv.is_cuda:
            layer.num_multiprocessors = 2  # a GPU's would make 32 parts, one after the other here
        return layer

    def fill(self, copy: int) -> None:
        """Write a cache anew: accumulators begin at 0."""
        size = self.kind.block_size
        positions = torch.arange(self.load.seq_len, device=self.kv.device)
        blocks = self.tables[copy].long()[:, positions // size]
        slots = (blocks * size + positions % size).flatten()
        self.layer().write_cache(self.key.flatten(0, 1), self.value.flatten(0, 1), slots)

    def attend(self, tile: Tile, copy: int = 0) -> Tensor:
        """Attend with a tile, and return the output, which the next call overwrites."""
        with trying(tile):
            self.layer().attend(self.query, self.batches[copy], self.out)
        return self.out

    def outputs(self, tile: Tile) -> Tensor:
        """Return the outputs of as many calls with the same queries as show what a stateful variant
        leaves in the cache: `[calls, tokens, num_heads, head_size]`."""
        self.fill(0)
        return torch.stack([self.attend(tile).clone() for _ in range(self.calls)])

    @property
    def calls(self) -> int:
        """Calls of `outputs`. In decode the first finds accumulators of 0, in which a wrong kernel
        would not show."""
        return 2 if self.variant.stateful and self.kind.phase == DECODE else 1

    def expected(self) -> Tensor:
        """Return what `outputs` must be, in float64."""
        load, found = self.load, []
        # No gate is written into the caches, which begin as zeros.
        gates = self.query.new_zeros(self.query.shape[1], load.seq_len)
        queries = self.query.unflatten(0, (load.batch, -1)).transpose(1, 2)
        for query, key, value in zip(queries, self.key, self.value, strict=True):
            state, outputs = None, []
            for _ in range(self.calls):
                output, state = reference.attention(
                    self.variant,
                    query,
                    key.transpose(0, 1),
                    value.transpose(0, 1),
                    scale=self.scale,
                    learned=self.learned,
                    state=state,
                    gates=gates if self.variant.gated else None,
                )
                outputs.append(output.transpose(0, 1))
            found.append(torch.stack(outputs))
        return torch.cat(found, 1)

    def timed(self, tile: Tile) -> Callable[[], float]:
        """Return what attends once with each cache, and says how many seconds a call took.

        On a GPU the calls are one CUDA graph: what it takes to launch them does not count.
        """
        for copy in range(self.copies):
            self.attend(tile, copy)  # compiles, and takes scratch memory
        if self.kv.device.type != "cuda":
            return functools.partial(self._on_the_clock, tile)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for copy in range(self.copies):
                self.attend(tile, copy)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))

        def replay() -> float:
            begin.record()
            graph.replay()
            end.record()
            end.synchronize()
            return float(begin.elapsed_time(end)) / 1e3 / self.copies

        return replay

    def _on_the_clock(self, tile: Tile) -> float:
        began = time.perf_counter()
        for copy in range(self.copies):
            self.attend(tile, copy)
        return (time.perf_counter() - began) / self.copies


def error_of(outputs: Tensor, expected: Tensor) -> float:
    """Return the largest difference relative to the same query's largest output; NaN if anything
    is. The last two dimensions are a query's."""
    wanted = expected.double()
    difference = (outputs.double() - wanted).abs().flatten(-2).amax(-1)
    # Where no score of softpick's is positive the output is 0, and so it must be.
    relative = difference / wanted.abs().flatten(-2).amax(-1)
    return float(torch.where(difference > 0, relative, difference).max())
