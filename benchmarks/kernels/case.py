"""A case: one shape of attention call, and the random tensors that every candidate gets."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any

import torch
from torch import Tensor

from attn_kernels.batch import Batch
from attn_kernels.kv_quant import KVFormat

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Case:
    """A batch of equal requests, each with `new_tokens` queries against its cached context.

    The phase is "decode", with one query a request, "prefill", or "write", in which the new tokens'
    keys and values are stored; the dtype, a key of DTYPES, that of queries, keys, values and
    outputs. `ctx` are tokens in the cache, in decode with the new one, else without the new ones;
    `block_size` are tokens in a block of the paged cache.
    """

    phase: str
    dtype: str
    head_dim: int
    ctx: int
    batch: int
    new_tokens: int
    num_heads: int
    num_kv_heads: int
    block_size: int

    @property
    def seq_len(self) -> int:
        """Tokens of each request in the cache, including the new ones."""
        return self.ctx if self.phase == "decode" else self.ctx + self.new_tokens

    @property
    def blocks(self) -> int:
        """Blocks of each request."""
        return -(-self.seq_len // self.block_size)

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that a call must read."""
        return self.bytes_in(None)

    def bytes_in(self, kv_format: KVFormat | None) -> int:
        """Return `kv_bytes` where keys and values are quantized."""
        return self._bytes(self.seq_len, kv_format)

    def written_in(self, kv_format: KVFormat | None) -> int:
        """Return the bytes of the new tokens' keys and values."""
        return self._bytes(self.new_tokens, kv_format)

    def _bytes(self, tokens: int, kv_format: KVFormat | None) -> int:
        vectors = 2 * self.batch * tokens * self.num_kv_heads
        if kv_format is not None:
            return vectors * kv_format.vector_bytes(self.head_dim)
        return vectors * self.head_dim * DTYPES[self.dtype].itemsize

    @property
    def flops(self) -> int:
        """Floating-point operations of the two products over the visible (query, key) pairs."""
        first = self.seq_len - self.new_tokens + 1
        pairs = self.new_tokens * (first + self.seq_len) // 2
        return 4 * self.batch * self.num_heads * self.head_dim * pairs

    def __str__(self) -> str:
        return f"{self.phase} {self.dtype} {label(vars(self))}"


def label(case: Mapping[str, Any]) -> str:
    """Return a short name, without phase and dtype, of a case or of its row."""
    if case["phase"] == "decode":
        return f"D{case['head_dim']} ctx {case['ctx']} x{case['batch']}"
    batch = f" x{case['batch']}" if case["phase"] == "write" else ""
    return f"D{case['head_dim']} {case['ctx']}+{case['new_tokens']}{batch}"


Grid = Mapping[str, Sequence[Any]]
FULL: Grid = {
    "phases": ("decode", "prefill"),
    "dtypes": ("fp32", "bf16"),
    "head_dims": (64, 128),
    "ctx": (512, 4096, 16384),
    "batch": (1, 8, 32),
    "new_tokens": (512, 2048),
    "context": (0, 4096),
}
QUICK: Grid = {**FULL, "head_dims": (64,), "ctx": (512, 4096), "batch": (8,), "new_tokens": (512,)}


def cases_of(grid: Grid, num_heads: int, num_kv_heads: int, block_size: int) -> Iterator[Case]:
    """Yield decode over `ctx x batch`, prefill (batch 1) over `context x new_tokens`, writes over
    `ctx x batch x new_tokens`, in every dtype and head size."""
    for phase, dtype, head_dim in product(grid["phases"], grid["dtypes"], grid["head_dims"]):
        sizes = product(grid["context"], (1,), grid["new_tokens"])
        if phase == "decode":
            sizes = product(grid["ctx"], grid["batch"], (1,))
        elif phase == "write":
            sizes = product(grid["ctx"], grid["batch"], grid["new_tokens"])
        for size in sizes:
            yield Case(phase, dtype, head_dim, *size, num_heads, num_kv_heads, block_size)


@dataclass(frozen=True)
class Inputs:
    """Random tensors of a case.

    Attributes:
        case: the case.
        query: `[batch * new_tokens, num_heads, head_dim]`.
        key, value: `[batch, seq_len, num_kv_heads, head_dim]`.
        query_start_loc: int32 `[batch + 1]`.
        seq_lens: int32 `[batch]`.
    """

    case: Case
    query: Tensor
    key: Tensor
    value: Tensor
    query_start_loc: Tensor
    seq_lens: Tensor

    @classmethod
    def make(cls, case: Case) -> Inputs:
        """Return standard normal inputs from torch's global generator."""
        dtype = DTYPES[case.dtype]
        num_queries = case.batch * case.new_tokens
        kv_shape = (case.batch, case.seq_len, case.num_kv_heads, case.head_dim)
        return cls(
            case,
            torch.randn(num_queries, case.num_heads, case.head_dim, dtype=dtype),
            torch.randn(kv_shape, dtype=dtype),
            torch.randn(kv_shape, dtype=dtype),
            torch.arange(case.batch + 1, dtype=torch.int32) * case.new_tokens,
            torch.full((case.batch,), case.seq_len, dtype=torch.int32),
        )

    @property
    def scale(self) -> float:
        """Factor of the raw scores."""
        return float(self.case.head_dim**-0.5)

    def batch(self, block_table: Tensor) -> Batch:
        """Return the batch whose tokens are in the blocks of a table `[batch, blocks]`."""
        case = self.case
        return Batch(block_table, self.query_start_loc, self.seq_lens,
                     max_query_len=case.new_tokens, max_seq_len=case.seq_len)  # fmt: skip


class Paging:
    """Copies of a case's batch scattered over one pool of blocks: as many layers of a model.

    Calls that take the copies in turn find none of it in the processor's caches, as in serving,
    where the other layers come in between. The copies' block tables share no block.
    """

    def __init__(self, case: Case, copies: int) -> None:
        self.case = case
        self.num_blocks = copies * case.batch * case.blocks
        order = torch.randperm(self.num_blocks, dtype=torch.int32)
        self.tables = order.view(copies, case.batch, case.blocks)

    def slots(self, copy: int, start: int) -> Tensor:
        """Return the slots of each request's tokens from `start` on, int64
        `[batch * (seq_len - start)]`."""
        size = self.case.block_size
        positions = torch.arange(start, self.case.seq_len)
        blocks = self.tables[copy].long()[:, positions // size]
        return (blocks * size + positions % size).flatten()


def copies_needed(case: Case, cold_bytes: int) -> int:
    """Return how many copies of a case's cache hold `cold_bytes` together.

    Prefill needs one: it is bound by arithmetic, and its new tokens have just been written.
    """
    return 1 if case.phase == "prefill" else max(1, -(-cold_bytes // case.kv_bytes))
