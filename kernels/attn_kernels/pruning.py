"""Attention with a fixed-size KV cache: context pruning (arXiv 2410.02703, section 4).

A layer keeps at most `budget` tokens of a request. The rule, token by token:

    Before token i is inserted: if `budget` tokens are stored, evict the one, other than the first,
    with the largest accumulator F_j, the oldest of equal ones. Insert i, attend, then F += S_i.

`S_i` is what head 0's raw scores add (`Variant.selection`); it does not depend on what has been
evicted, so that a chunk's accumulators are prefix sums, the evictions are one greedy scan over
them, and a mask of births and deaths gives every query the tokens that it would have seen alone.
For F to be the same in any order of additions it is a fixed-point integer.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor

from attn_kernels.batch import Batch
from attn_kernels.checks import check_layer
from attn_kernels.dense import attend
from attn_kernels.variant import LEAST_BUDGET, Variant

FRACTION_BITS = 16
"""Bits of an accumulator's fraction: it is an int32 in units of 2^-16 and stops at LARGEST."""

LARGEST = 2**31 - 1

LARGEST_GPU_BUDGET = 16384
"""Slots that one program of the Triton kernels scans."""

NUMBERS_BYTES = 8
"""Bytes of a slot's accumulator and position."""


@dataclass(frozen=True)
class PageShape:
    """The shape of a page: what one layer keeps of one request.

    Attributes:
        budget: slots of a page.
        num_kv_heads, head_size: of the layer.
        dtype: of the keys and values.
        selector: head 0 is another rank's: a slot has its key, too.

    Raises:
        ValueError: the budget is below LEAST_BUDGET.
    """

    budget: int
    num_kv_heads: int
    head_size: int
    dtype: torch.dtype
    selector: bool = False

    def __post_init__(self) -> None:
        if self.budget < LEAST_BUDGET:
            raise ValueError(f"a budget must be at least {LEAST_BUDGET} tokens, not {self.budget}")

    @property
    def num_bytes(self) -> int:
        """Bytes of a page."""
        return self.budget * slot_bytes(
            self.num_kv_heads, self.head_size, self.dtype, self.selector
        )


@dataclass
class Page:
    """What one layer keeps of one request. Slots are in no order; `min(num_tokens, budget)` are
    taken, from the front.

    Attributes:
        keys, values: `[num_kv_heads, budget, head_size]`.
        selecting_keys: head 0's, `[budget, head_size]`.
        accumulators: `[budget]` int32.
        positions: `[budget]` int32.
    """

    keys: Tensor
    values: Tensor
    selecting_keys: Tensor
    accumulators: Tensor
    positions: Tensor

    @classmethod
    def view(cls, memory: Tensor, shape: PageShape) -> Page:
        """Return the page in `memory`: `[shape.num_bytes]` uint8, whatever is in it.

        Keys, values, a selector's keys, accumulators and positions follow one another, each in the
        order of its shape.
        """
        tokens = memory[: -NUMBERS_BYTES * shape.budget].view(shape.dtype)
        numbers = memory[-NUMBERS_BYTES * shape.budget :].view(torch.int32)
        heads = tokens.view(-1, shape.budget, shape.head_size)
        keys, values = heads[: 2 * shape.num_kv_heads].unflatten(0, (2, -1))
        selecting_keys = heads[-1] if shape.selector else keys[0]
        return cls(keys, values, selecting_keys, *numbers.view(2, shape.budget))


def slot_bytes(
    num_kv_heads: int, head_size: int, dtype: torch.dtype, selector: bool = False
) -> int:
    """Return the bytes of a page for each token of its budget."""
    return (2 * num_kv_heads + selector) * head_size * dtype.itemsize + NUMBERS_BYTES


def fixed_point(x: Tensor) -> Tensor:
    """Return `max(x, 0)` in units of 2^-FRACTION_BITS, int64, at most LARGEST."""
    return (x.double().relu() * 2**FRACTION_BITS).round().clamp(max=LARGEST).long()


def evict(
    accumulators: Tensor, positions: Tensor, stored: int, budget: int
) -> tuple[Tensor, Tensor]:
    """Find out which tokens are evicted, one after another.

    Args:
        accumulators: `[num_queries, stored + num_queries]` int64: of the stored tokens and then of
            the chunk's own, as each query finds them.
        positions: `[stored + num_queries]`.
        stored: tokens in slots 0 to `stored - 1` before the chunk.
        budget: slots.

    Returns:
        `(deaths, slots)`, each `[stored + num_queries]`: which query first misses the token (the
        number of queries if none does), and the token's slot.
    """
    num_queries, num_tokens = accumulators.shape
    deaths = torch.full((num_tokens,), num_queries)
    slots = torch.arange(num_tokens)
    # The largest accumulator first, then the smallest position; the first token and those that
    # are not there last.
    rank = (accumulators << 31) - positions
    rank.masked_fill_(positions == 0, -1 << 62)
    absent = torch.arange(num_tokens) >= stored
    for i in range(num_queries):
        if stored == budget:
            victim = int(rank[i].masked_fill(absent, torch.iinfo(torch.int64).min).argmax())
            absent[victim] = True
            deaths[victim] = i
            slots[num_tokens - num_queries + i] = slots[victim]
        else:
            slots[num_tokens - num_queries + i] = stored
            stored += 1
        absent[num_tokens - num_queries + i] = False
    return deaths, slots


def attend_pruned(
    variant: Variant,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    page: Page,
    num_tokens: int,
    scale: float,
    selecting: tuple[Tensor, Tensor] | None = None,
) -> Tensor:
    """Attend with a chunk of a request's tokens to what its page keeps, and store them there.

    The result is that of one token at a time, however a text is cut into chunks.

    Args:
        variant: a prunable variant.
        q: `[num_heads, num_queries, head_size]`, float32 or float64.
        k, v: `[num_kv_heads, num_queries, head_size]` of the same tokens.
        page: changed in place.
        num_tokens: of the request before the chunk.
        scale: factor of the raw scores.
        selecting: head 0's queries and keys, `[num_queries, head_size]` each; None: those of `q`
            and `k`.

    Returns:
        `[num_heads, num_queries, head_size]`.
    """
    num_queries, budget = q.shape[-2], page.positions.shape[0]
    selecting_q, selecting_k = selecting or (q[0], k[0])
    stored = min(num_tokens, budget)
    query = torch.arange(num_queries)
    keys = torch.cat([page.keys[:, :stored].to(k.dtype), k], 1)
    values = torch.cat([page.values[:, :stored].to(v.dtype), v], 1)
    selecting_keys = torch.cat([page.selecting_keys[:stored].to(k.dtype), selecting_k])
    positions = torch.cat([page.positions[:stored].long(), num_tokens + query])
    births = torch.cat([torch.full((stored,), -1), query])

    selectable = (births < query[:, None]) & (positions != 0)
    added = variant.selection(selecting_q * scale @ selecting_keys.T)
    added = fixed_point(added).masked_fill(~selectable, 0)
    earlier = torch.cat([page.accumulators[:stored].long(), torch.zeros_like(query)])
    after = (earlier + added.cumsum(0)).clamp(max=LARGEST)
    before = torch.cat([earlier[None], after[:-1]])
    deaths, slots = evict(before, positions, stored, budget)

    mask = (births <= query[:, None]) & (query[:, None] < deaths)
    penalty = before.to(q.dtype) / 2**FRACTION_BITS
    output, _ = attend(variant, q, keys, values, mask[None], scale=scale, penalty=penalty)

    kept = deaths == num_queries
    place = slots[kept]
    page.keys[:, place] = keys[:, kept].to(page.keys.dtype)
    page.values[:, place] = values[:, kept].to(page.values.dtype)
    page.selecting_keys[place] = selecting_keys[kept].to(page.keys.dtype)
    page.accumulators[place] = after[-1][kept].int()
    page.positions[place] = positions[kept].int()
    return output


class PrunedLayer(ABC):
    """One layer's attention within a budget, bound to its pages.

    Args:
        variant: a prunable variant.
        pages: `[num_pages, shape.num_bytes]` uint8.
        shape: of each page.
        num_heads: the layer's query heads.
        scale: factor of the raw scores.

    Raises:
        ValueError: the kernels do not support this shape, or the pages do not have it.
    """

    def __init__(
        self, variant: Variant, pages: Tensor, shape: PageShape, *, num_heads: int, scale: float
    ) -> None:
        self.variant, self.pages, self.shape = variant, pages, shape
        self.num_heads, self.scale = num_heads, scale
        check_layer(num_heads, shape.num_kv_heads, None)
        if (
            pages.dim() != 2
            or pages.shape[1] * pages.itemsize < shape.num_bytes
            or pages.stride(1) != 1
        ):
            raise ValueError(f"pages are {list(pages.shape)}, not [..., {shape.num_bytes}] bytes")

    @abstractmethod
    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch: Batch,
        out: Tensor,
        selecting: Tensor | None = None,
    ) -> None:
        """Store a step's tokens and attend.

        Args:
            query: `[num_tokens, num_heads, head_size]`.
            key, value: `[num_tokens, num_kv_heads, head_size]`; stored, and seen, in the pages'
                dtype.
            batch: its requests; the first entry of a request's block table is its page.
            out: `[>= num_tokens, num_heads, head_size]`, written in place.
            selecting: `[num_tokens, 2, head_size]`: head 0's queries and keys, of a selector.

        Raises:
            MemoryError: no memory for scratch space.
        """


class TorchPrunedLayer(PrunedLayer):
    """`attend_pruned` bound to one layer's pages, in torch operations: correct and slow."""

    def step(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        batch: Batch,
        out: Tensor,
        selecting: Tensor | None = None,
    ) -> None:
        starts, lens = batch.query_start_loc.tolist(), batch.seq_lens.tolist()
        for request, (start, stop) in enumerate(itertools.pairwise(starts)):
            if start == stop:
                continue
            page = Page.view(self.pages[batch.block_table[request, 0]], self.shape)
            q, k, v = (
                x[start:stop].transpose(0, 1).double()
                for x in (query, key.to(self.shape.dtype), value.to(self.shape.dtype))
            )
            num_before, head_0 = lens[request] - (stop - start), None
            if selecting is not None:
                q_0, k_0 = selecting[start:stop].unbind(1)
                head_0 = q_0.double(), k_0.to(self.shape.dtype).double()
            output = attend_pruned(self.variant, q, k, v, page, num_before, self.scale, head_0)
            out[start:stop] = output.transpose(0, 1).to(out.dtype)
