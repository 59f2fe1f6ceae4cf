"""A captured decode step, replayed after block tables, lengths and requests changed in place."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import pytest
import torch

from attn_kernels.batch import Batch
from tests.attn_kernels.cases import GPU_KERNELS
from tests.gpu.paged import DTYPES, ON_GPU, Paged, PagedRequests, Setup, check
from tests.gpu.test_attention import UNSPLIT, split_processors, tiny

SIZE = 4
"""PagedRequests of the captured step; those that are missing are padding."""


def capture(device: torch.device, step: Callable[[], None]) -> Callable[[], None]:
    """Return what replays the step, captured once it has run; without a GPU, the step itself."""
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
        """Replay with `(request, position)` each; return the error against the reference.

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


# The compiled kernels are checked in the format that is served most.
SETUPS = [tiny("selective")] + [
    pytest.param(Setup(name, "bf16", 128, 4), marks=ON_GPU) for name in GPU_KERNELS
]


@pytest.mark.parametrize("split", [True, False], ids=["split", "whole"])
@pytest.mark.parametrize("setup", SETUPS, ids=str)
def test_replay(setup: Setup, split: bool) -> None:
    """Prefill, then four replays: as captured, later tokens, other blocks, other requests."""
    requests = PagedRequests(setup)
    paged = Paged(requests)
    paged.layer.num_multiprocessors = split_processors(setup.device) if split else UNSPLIT
    ends = [n - 4 for n in setup.lengths]
    paged.step([(r, 0, end) for r, end in enumerate(ends)])
    decoder = Decoder(paged)
    everyone = range(len(ends))
    errors = {"replay": decoder.decode([(r, ends[r]) for r in everyone])}
    errors["later tokens"] = decoder.decode([(r, ends[r] + 1) for r in everyone])
    paged.move()
    errors["blocks moved"] = decoder.decode([(r, ends[r] + 2) for r in everyone])
    errors["fewer requests, reordered"] = decoder.decode([(r, ends[r] + 3) for r in (2, 0)])
    check(errors, requests)


def test_stale_block_table_fails() -> None:
    """A replay that does not see the new block table reads NaN."""
    paged = Paged(PagedRequests(tiny("softmax")))
    paged.layer.num_multiprocessors = UNSPLIT
    ends = [n - 2 for n in paged.requests.setup.lengths]
    paged.step([(1, 0, ends[1])])
    decoder = Decoder(paged)
    assert decoder.decode([(1, ends[1])]) <= 1e-5
    old = paged.table
    paged.move()
    assert not torch.equal(old, paged.table)
    paged.table = old
    error = decoder.decode([(1, ends[1] + 1)])
    assert error != error
