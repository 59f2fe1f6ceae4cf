"""A step's requests, as every layer's attention reads them."""

from __future__ import annotations

import ctypes
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor


class _Batch(ctypes.Structure):
    """`Batch` of cpu/call.hpp."""

    _fields_ = (
        ("block_table", ctypes.c_void_p),
        ("block_table_stride", ctypes.c_int64),
        ("query_start_loc", ctypes.c_void_p),
        ("seq_lens", ctypes.c_void_p),
        ("num_reqs", ctypes.c_int32),
        ("threads", ctypes.c_int32),
    )


@dataclass(eq=False)
class Batch:
    """One step's batch. Made once a step for all layers: what a layer does in Python, it does as
    often as there are layers.

    A dataclass, because vLLM copies the fields of such a class (fast prefill with shared KV).

    Args:
        block_table: `[num_reqs, max_blocks]` int32: each request's cache blocks in order.
        query_start_loc: `[num_reqs + 1]` int32: request r owns the step's queries
            `query_start_loc[r] : query_start_loc[r + 1]`, its last tokens.
        seq_lens: `[num_reqs]` int32: tokens of each request in the cache, this step's included.
        slot_mapping: `[num_tokens]` int64: where the step's new tokens go in the cache, as
            `write_cache` takes it. Empty unless given.
        max_query_len, max_seq_len: no request has more queries, or more tokens; the size of what is
            launched on a GPU.
        num_decodes: so many requests at the beginning have one query each. A GPU attends with them
            apart from the others (`halves`), by a kernel that cuts contexts into parts.

    Raises:
        ValueError: the shapes do not fit each other.
    """

    block_table: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    slot_mapping: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    _: KW_ONLY
    max_query_len: int = 0
    max_seq_len: int = 0
    num_decodes: int = 0
    halves: tuple[Batch, ...] = field(init=False, default=())
    """The first `num_decodes` requests and the others, which count their queries from 0; empty
    where one of them is all."""
    struct: _Batch = field(init=False)
    """The same for C++; it points into the tensors."""
    address: int = field(init=False)
    """Of `struct`."""
    num_tokens: int = field(init=False)
    """Queries of all requests; 0 on a GPU, which is not waited for."""
    slots_address: int = field(init=False)
    """Of `slot_mapping`."""

    def __post_init__(self) -> None:
        self.block_table = self.block_table.int()
        self.query_start_loc = self.query_start_loc.int().contiguous()
        self.seq_lens = self.seq_lens.int().contiguous()
        self.slot_mapping = self.slot_mapping.long().contiguous()
        table, num_reqs = self.block_table, self.seq_lens.shape[0]
        if table.stride(-1) != 1:
            self.block_table = table = table.contiguous()
        if (
            self.query_start_loc.shape != (num_reqs + 1,)
            or table.dim() != 2
            or table.shape[0] < num_reqs
        ):
            raise ValueError(
                f"a batch of {list(self.seq_lens.shape)} lengths has query_start_loc "
                f"{list(self.query_start_loc.shape)} and block_table {list(table.shape)}"
            )
        count = self.num_decodes
        if 0 < count < num_reqs:
            starts = self.query_start_loc
            first = Batch(
                table[:count], starts[: count + 1], self.seq_lens[:count],
                max_query_len=1, max_seq_len=self.max_seq_len,
            )  # fmt: skip
            rest = Batch(
                table[count:num_reqs], starts[count:] - count, self.seq_lens[count:],
                max_query_len=self.max_query_len, max_seq_len=self.max_seq_len,
            )  # fmt: skip
            self.halves = first, rest
        self.num_tokens = 0 if table.is_cuda else int(self.query_start_loc[-1])
        self.struct = _Batch(
            self.block_table.data_ptr(),
            self.block_table.stride(0),
            self.query_start_loc.data_ptr(),
            self.seq_lens.data_ptr(),
            num_reqs,
            torch.get_num_threads(),
        )
        self.address = ctypes.addressof(self.struct)
        self.slots_address = self.slot_mapping.data_ptr()


def heads_together(x: Tensor) -> Tensor:
    """Return `x` `[tokens, heads, size]` with its heads side by side in memory, copied if need
    be."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
