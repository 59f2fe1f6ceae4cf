"""A captured decode step: replayed after block tables, lengths and requests changed in place."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Sequence
from itertools import product

import torch

from attn_kernels.batch import Batch
from benchmarks.gpu_check.checks import Check, Row, Task
from benchmarks.gpu_check.matrix import UNSPLIT, split_processors
from benchmarks.gpu_check.paged import Paged, Requests, Setup, judged
from benchmarks.kernels.case import DTYPES

SIZE = 4
"""Requests of the captured step; those that are missing are padding."""


def capture(device: torch.device, step: Callable[[], None]) -> Callable[[], None]:
    """A function that replays the step, captured once it has run; without a GPU, the step."""
    if device.type != "cuda":
        return step
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # compiles, and takes scratch memory
        step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph.replay


class Decoder:
    """A decode step on buffers that stay where they are."""

    def __init__(self, paged: Paged) -> None:
        self.paged = paged
        setup, device = paged.requests.setup, paged.device
        dtype = DTYPES[setup.dtype]
        self.q = torch.zeros(SIZE, setup.num_heads, setup.head_dim, dtype=dtype, device=device)
        self.k = torch.zeros(SIZE, setup.num_kv_heads, setup.head_dim, dtype=dtype, device=device)
        self.v, self.out = self.k.clone(), self.q.clone()
        self.batch = Batch(
            torch.zeros(SIZE, paged.table.shape[1], dtype=torch.int32, device=device),
            torch.zeros(SIZE + 1, dtype=torch.int32, device=device),
            torch.zeros(SIZE, dtype=torch.int32, device=device),
            torch.full((SIZE,), -1, device=device),
            max_query_len=1,
            max_seq_len=max(setup.lengths),
        )
        self.replay = capture(device, self._step)  # of padding alone: the cache stays as it is

    def _step(self) -> None:
        self.paged.layer.write_cache(self.k, self.v, self.batch.slot_mapping)
        self.paged.layer.attend(self.q, self.batch, self.out)

    def decode(self, tokens: Sequence[tuple[int, int]]) -> float:
        """Replay with `(request, position)` each; the error against the law.

        Raises:
            AssertionError: outputs of padding were written.
        """
        own, paged, batch = self.paged.requests, self.paged, self.batch
        n = len(tokens)
        for buffer, source in ((self.q, own.q), (self.k, own.k), (self.v, own.v)):
            buffer.fill_(torch.nan)
            buffer[:n] = torch.stack([source[r][position] for r, position in tokens]).to(buffer)
        batch.block_table.fill_(10**9)  # names no block
        batch.block_table[:n] = paged.table[[r for r, _ in tokens]].to(batch.block_table)
        batch.query_start_loc.copy_(torch.arange(SIZE + 1).clamp(max=n))
        batch.seq_lens.copy_(torch.tensor([p + 1 for _, p in tokens] + [0] * (SIZE - n)))
        slots = [paged.slots(r, p, p + 1) for r, p in tokens]
        batch.slot_mapping.copy_(torch.cat([*slots, torch.full((SIZE - n,), -1)]))
        self.out.fill_(torch.nan)
        self.replay()
        out = self.out.cpu()
        assert bool(out[n:].isnan().all()), "wrote outputs of padding"
        return paged.error([(r, p, p + 1) for r, p in tokens], [row[None] for row in out[:n]])


def check(setup: Setup, processors: int) -> Iterable[Row]:
    """Prefill, then four replays: as captured, later tokens, other blocks, other requests."""
    requests = Requests(setup)
    paged = Paged(requests)
    paged.layer.num_processors = processors
    ends = [n - 4 for n in setup.lengths]
    paged.step([(r, 0, end) for r, end in enumerate(ends)])
    decoder = Decoder(paged)
    everyone = range(len(ends))
    errors = [decoder.decode([(r, ends[r] + step) for r in everyone]) for step in range(2)]
    paged.move()
    errors.append(decoder.decode([(r, ends[r] + 2) for r in everyone]))
    errors.append(decoder.decode([(r, ends[r] + 3) for r in (2, 0)]))
    names = ("replay", "later tokens", "blocks moved", "fewer requests, reordered")
    columns = {"variant": setup.variant, "dtype": setup.dtype, "split": processors > 1}
    return [
        judged(error, requests, phase=name, **columns)
        for name, error in zip(names, errors, strict=True)
    ]


def checks(task: Task) -> list[Check]:
    """Each variant with whole and with split contexts, in the widest of the usual formats."""
    dtype = "bf16" if "bf16" in task.dtypes else task.dtypes[0]
    head_dim = 128 if 128 in task.head_dims else task.head_dims[0]
    found = []
    for variant, processors in product(task.variants, (split_processors(task.device), UNSPLIT)):
        setup = Setup(
            variant, dtype, head_dim, 4, None, longest=task.longest, device=task.device,
            seed=task.seed,
        )  # fmt: skip
        name = f"{setup}, {'split' if processors > 1 else 'whole'} contexts"
        found.append(Check(name, functools.partial(check, setup, processors)))
    return found
