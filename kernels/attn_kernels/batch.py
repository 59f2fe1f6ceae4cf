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
    """

    block_table: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor
    slot_mapping: Tensor = field(default_factory=lambda: torch.empty(0, dtype=torch.int64))
    _: KW_ONLY
    max_query_len: int = 0
    max_seq_len: int = 0
    struct: _Batch = field(init=False)
    """The same for C++; it points into the tensors."""
    address: int = field(init=False)
    """Of `struct`."""

    def __post_init__(self) -> None:
        self.block_table = self.block_table.int()
        self.query_start_loc = self.query_start_loc.int()
        self.seq_lens = self.seq_lens.int()
        self.slot_mapping = self.slot_mapping.long()
        self.struct = _Batch(
            self.block_table.data_ptr(),
            self.block_table.stride(0),
            self.query_start_loc.data_ptr(),
            self.seq_lens.data_ptr(),
            self.seq_lens.shape[0],
            torch.get_num_threads(),
        )
        self.address = ctypes.addressof(self.struct)


def heads_together(x: Tensor) -> Tensor:
    """Return `x` `[tokens, heads, size]` with its heads side by side in memory, copied if need
    be."""
    return x if x.stride()[1:] == (x.shape[2], 1) else x.contiguous()
